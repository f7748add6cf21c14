"""`mxdit eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mxdit.cli.bench.tables import aligned
from mxdit.cli.console import (
    Device,
    Dtype,
    Frames,
    Size,
    app,
    check_output,
    device_of,
    dtype_of,
    need,
    path_of,
    say,
    size_of,
    tell,
    tell_slow,
)
from mxdit.cli.progress import Shown
from mxdit.errors import InputError
from mxdit.evals.metrics.statistics import LEAST
from mxdit.evals.modes import STANDARD
from mxdit.models import tasks

if TYPE_CHECKING:
    from mxdit.evals.settings import Settings

MODES = ", ".join(mode.name for mode in STANDARD)
COLUMNS = (
    "sqnr_db", "embedding_error", "velocity_error", "accumulated_error", "latent_error", "psnr_db", "ssim", "ms_ssim", "cvvdp_jod", "flip", "flicker", "lpips", "fvd", "digit",
    "color", "direction", "first_frame_psnr_db",
)  # fmt: skip


@app.command("eval")
def evaluate(
    directory: Annotated[
        str, typer.Argument(help="The unquantized model's directory, or 'bundled'.", metavar="DIR|bundled")
    ],
    task: Annotated[str | None, typer.Option(help=f"{', '.join(tasks())}. Default: what the model makes.")] = None,
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
    size: Size = None,
    frames: Frames = None,
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
    device: Device = "cpu",
    dtype: Dtype = "bf16",
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
    from mxdit.evals.metrics.choice import choose_metrics
    from mxdit.evals.run import Run
    from mxdit.evals.settings import Settings
    from mxdit.generation import loading
    from mxdit.generation.directory import bundled, open_model

    need("diffusers", "transformers")
    if output is not None:
        check_output(output, ".json")
    if report is not None:
        need("matplotlib", "av")
        if report.exists() and not report.is_dir():
            raise InputError("a file is in the way", where="--report", got=str(report), expected="a directory to make")
    if task not in (None, *tasks()):
        raise InputError("no such task", where="--task", got=repr(task), expected=" or ".join(tasks()))
    chosen = choose_metrics(_names(metrics), weights_dir)
    settings = Settings.choose(
        open_model(path_of(directory) or bundled(task or "t2v")),
        task=task,
        modes=_names(modes),
        custom=mode or (),
        prompts=prompts,
        count=count,
        seeds=seeds,
        quick=quick,
        probes=probes,
        request={"steps": steps, "size": None if size is None else size_of(size), "frames": frames},
        metrics=chosen.video,
        networks=chosen.networks,
        weights=weights_dir,
        dtype=dtype_of(dtype),
        device=device_of(device),
    )
    _tell_what(settings, prompts, chosen.missing if metrics is None else {})
    tell_slow(settings.dtype, settings.device)
    loading.show_loading(False)
    with Shown() as shown:
        run = Run(settings, Cache(cache), shown.progress)
        results = run.results()
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show(results)
    if report is not None:
        from mxdit.evals.pages.report import write_report

        report.mkdir(parents=True, exist_ok=True)
        (report / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_report(results, run.clips, report)
        say(f"{report}/: report.html, report.md, results.json")


def _names(text: str | None) -> list[str] | None:
    """What is separated by commas."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _tell_what(settings: Settings, prompts: Path | None, missing: Mapping[str, str]) -> None:
    """What is left out, and what begins."""
    from mxdit.evals.metrics.networks import ADAPTERS

    if prompts is None and settings.judge is None:
        tell("without digit, color and direction: the judge knows clips of the model's own size only")
    brought = set(ADAPTERS) if missing and settings.weights is None else set()
    for name, reason in missing.items():
        if name not in brought:
            tell(f"without {name}: {reason}")
    if brought:
        tell(
            f"without {', '.join(ADAPTERS)}: no --weights-dir is given; `--metrics lpips` and so on say what it would hold"
        )
    request, model = settings.videos[0].request, settings.model
    clips = f"{request.width}x{request.height}, {request.frames} frames, {request.steps} steps"
    name = model.preset(settings.task).name
    tell(f"{name} from {model.path}: {len(settings.videos)} videos ({clips}) in {len(settings.modes)} modes")


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
