"""`mxdit eval`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mxdit.cli.bench.tables import aligned
from mxdit.cli.console import app, check_output, device_of, dtype_of, err, need, say, size_of, tell
from mxdit.errors import InputError
from mxdit.evals.metrics.statistics import LEAST
from mxdit.evals.modes import QUICK, STANDARD, choose

MODES = ", ".join(mode.name for mode in STANDARD)
SMALL = 1 << 30  # bytes of experts' files, below which more videos are looked into
COLUMNS = (
    "sqnr_db", "velocity_error", "latent_error", "psnr_db", "ssim", "ms_ssim", "cvvdp_jod", "flip", "flicker", "lpips", "fvd", "digit",
    "color", "direction", "first_frame_psnr_db",
)  # fmt: skip


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="The unquantized model's directory, or 'bundled'.", metavar="DIR|bundled")
    ],
    task: Annotated[str | None, typer.Option(help="t2v or i2v. Default: what the model makes.")] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help=f"Which of the standard modes, by name, glob or first word, separated by commas: {MODES}. Default: all. "
            "bf16 is the reference and always there; 'bf16' alone leaves the others out.",
            metavar="NAMES",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="One more mode: a quantized directory, or config keys as JSON, such as "
            """'three={"quant_method": "mxfp4", "num_bf16_fallback_layers": 3}'. May be repeated.""",
            metavar="NAME=DIR|JSON",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="One prompt a line; for i2v a tab and an image's path follow. Default: the bundled model's."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many prompts. Default: 32, or all of --prompts.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Videos per prompt. Default: 2.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: 4 prompts, one seed, three modes beside bf16.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", metavar="WxH")] = None,
    frames: Annotated[int | None, typer.Option(help="Number of frames, 1 more than a multiple of 4.")] = None,
    probes: Annotated[
        int | None,
        typer.Option(help="Videos whose steps are looked into (layers, velocities). Default: 6; 1 for a big model."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Video metrics, separated by commas. Default: all that can be computed.")
    ] = None,
    weights_dir: Annotated[
        Path | None,
        typer.Option(help="Weights of the networks that lpips, fvd and vbench need; nothing is downloaded."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32: of everything that is not quantized.")] = "bf16",
    cache: Annotated[
        Path,
        typer.Option(
            help="Where videos and figures are kept: of A14B at 480p about 0.1 GB for each clip of each mode, 0.4 GB for BF16's, "
            "and the checkpoints of offline modes."
        ),
    ] = Path("mxdit-eval"),
    report: Annotated[Path | None, typer.Option(help="Directory to make, with the report and the results.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the results there.", metavar="FILE")] = None,
) -> None:
    """Measure what each mode costs against BF16: layers, velocities, latents, videos, and what the videos show.

    Every mode makes the same videos, from the same prompts, seeds and schedule. What was computed is kept in --cache and
    used again as long as model, settings, versions and device are the same, so an interrupted run goes on where it was.

        mxdit eval bundled --quick --report quick

        mxdit eval Wan2.2-T2V-A14B-Diffusers --prompts prompts.txt --modes mxfp4,mxfp8 --device cuda --report out

        mxdit eval bundled --modes bf16 --mode 'first={"quant_method": "mxfp4", "num_bf16_fallback_layers": 1}'
    """
    from mxdit.evals.cache import Cache
    from mxdit.evals.metrics.networks import ADAPTERS
    from mxdit.evals.metrics.video_metrics import VIDEO_METRICS, unavailable
    from mxdit.evals.run import Evaluation
    from mxdit.evals.samples import choose_videos
    from mxdit.generation import loading
    from mxdit.generation.directory import bundled, open_model, tasks

    need("diffusers", "transformers")
    if output is not None:
        check_output(output, ".json")
    if report is not None:
        need("matplotlib", "av")
        if report.exists() and not report.is_dir():
            raise InputError("a file is in the way", where="--report", got=str(report), expected="a directory to make")
    if task not in (None, *tasks()):
        raise InputError("no such task", where="--task", got=repr(task), expected=" or ".join(tasks()))
    patterns = [part.strip() for part in modes.split(",")] if modes is not None else list(QUICK) if quick else None
    chosen = choose(patterns, mode or ())
    missing = unavailable() | {name: why for name in ADAPTERS if (why := ADAPTERS[name].why_not(weights_dir))}
    possible = [name for name in (*VIDEO_METRICS, *ADAPTERS) if name not in missing]
    named = possible if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    for name in named:
        if name not in possible:
            got, expected = missing.get(name, repr(name)), ", ".join(possible)
            raise InputError(f"{name} cannot be computed", where="--metrics", got=got, expected=expected)
    path = bundled(task or "t2v") if model == "bundled" else Path(model)
    directory = open_model(path)
    task = task or directory.tasks[0]
    videos, judge = choose_videos(
        directory,
        task,
        prompts=prompts,
        count=4 if quick and count is None and prompts is None else count,
        seeds=(1 if quick else 2) if seeds is None else seeds,
        options={"steps": steps, "size": None if size is None else size_of(size), "frames": frames},
    )
    files = [file for name in directory.components for file in (path / name).glob("*.safetensors")]
    small = sum(file.stat().st_size for file in files) < SMALL
    if probes is None:
        probes = 6 if small else 1
    elif probes < 1:
        raise InputError("there must be at least one", where="--probes", got=probes)
    used, where = dtype_of(dtype), device_of(device)

    if prompts is None and judge is None:
        tell("without digit, color and direction: the judge knows clips of the model's own size only")
    if metrics is None:
        brought = set() if weights_dir else set(ADAPTERS)
        for name, reason in missing.items():
            if name not in brought:
                tell(f"without {name}: {reason}")
        if brought:
            tell(
                f"without {', '.join(ADAPTERS)}: no --weights-dir is given; `--metrics lpips` and so on say what it would hold"
            )
    request = videos[0].request
    clips = f"{request.width}x{request.height}, {request.frames} frames, {request.steps} steps"
    tell(f"{directory.preset(task).name} from {path}: {len(videos)} videos ({clips}) in {len(chosen)} modes")
    loading.show_loading(False)
    with _Shown() as shown:
        evaluation = Evaluation(
            directory,
            task,
            chosen,
            videos,
            Cache(cache),
            judge,
            [name for name in named if name in VIDEO_METRICS],
            directory.preset(task).fps,
            [name for name in named if name in ADAPTERS],
            weights_dir,
            dtype=used,
            device=where,
            probes=probes,
            rows=256 if small else 64,
            progress=shown.progress,
        )
        results = evaluation.run()
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show(results)
    if report is not None:
        from mxdit.evals.pages.report import write_report

        report.mkdir(parents=True, exist_ok=True)
        (report / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_report(results, evaluation.clips, report)
        say(f"{report}/: report.html, report.md, results.json")


class _Shown:
    """Progress on stderr: a bar on a terminal; elsewhere a line when something new begins."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._bar = self._bars.add_task("", total=None)
        self._what, self._started = "", time.perf_counter()

    def __enter__(self) -> _Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, what: str, done: float, total: int) -> None:
        if what != self._what and not err.is_terminal:
            tell(f"{time.perf_counter() - self._started:7.1f} s  {what}")
        self._what = what
        self._bars.update(self._bar, description=what, completed=done, total=total)


def _show(results: dict[str, Any]) -> None:
    """One row a mode; a line is as long as it has to be, because a folded one cannot be read."""
    metrics = [name for name in COLUMNS if name in results["metrics"]]
    arrows = {"higher": " (+)", "lower": " (-)", None: ""}
    titles = [results["metrics"][name]["title"] + arrows[results["metrics"][name]["better"]] for name in metrics]
    rows = [["mode", "MiB", *titles, "seconds"]]
    for mode in results["modes"]:
        cells = [_cell(mode["summary"].get(name), results["metrics"][name]["unit"]) for name in metrics]
        rows.append([mode["name"], f"{mode['weights_bytes'] / 2**20:.1f}", *cells, f"{mode['seconds']:.0f}"])
    for cells in aligned(rows):
        say("  ".join(cells))
    for mode in results["modes"]:
        if mode["same_as"]:
            say(f"{mode['name']} computes what {mode['same_as']} does, bit for bit.")
    samples, probes = results["settings"]["samples"], results["settings"]["probe_samples"]
    say(
        f"(+) higher is better, (-) lower. Means ± half of the 95 % interval, where there are {LEAST} prompts or more; {samples} "
        f"videos, {probes} of them for SQNR and velocity. {results['seconds']:.0f} s."
    )


def _cell(value: dict[str, float] | None, unit: str) -> str:
    if value is None:
        return "-"
    scale, digits = (100, 1) if unit == "share" else (1, 2 if unit else 4)
    text = f"{value['mean'] * scale:.{digits}f}"
    if value["lo"] is not None:
        text += f" ±{(value['hi'] - value['lo']) / 2 * scale:.{digits}f}"
    return text + (" %" if unit == "share" else "")
