"""`mxdit bench gemm`, `memory`, `load` and `pipeline`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mxdit.cli.console import app, check_output, device_of, err, need, say, size_of, tell
from mxdit.cli.tables import MIB, gemm_cells, progress, say_baseline, say_machine, say_totals, table
from mxdit.errors import InputError
from mxdit.models.shapes import PUBLISHED

QUICK_ROUNDS = 3
PROMPT = "a boat on a lake"  # where a model has none of its own; what it says changes neither bytes nor seconds
NAMES = ("mxfp4", "mxfp4_dualscale", "mxfp8", "w4a8", "w4a16")

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory beside BF16, in the same run, on this machine. docs/measuring.md says what the numbers mean.",
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="A pipeline's directory, or 'bundled'.", metavar="DIR|bundled")]
Task = Annotated[str, typer.Option(help="t2v or i2v.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ...")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every number to this file as well.", metavar="FILE")]
Methods = Annotated[
    list[str] | None,
    typer.Option(help="Only this method: mxfp8, mxfp4, mxfp4_dualscale. May be repeated.", metavar="METHOD"),
]
Scratch = Annotated[
    Path | None,
    typer.Option(
        help="Where checkpoints are made and removed; the system's by default. Needs room for one of each method, for A14B about "
        "60 GB and three times what is not quantized."
    ),
]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's own.", metavar="WxH")]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip. Default: the model's own.")]


@bench.command()
def gemm(
    model: Annotated[
        list[str] | None, typer.Option(help="A14B (default) or TI2V-5B. May be repeated.", metavar="MODEL")
    ] = None,
    clip: Annotated[
        list[str] | None, typer.Option(help="480p or 720p; both by default. May be repeated.", metavar="CLIP")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="This product instead, never scaled. May be repeated.", metavar="M,K,N")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Only this: {', '.join(NAMES)}. May be repeated.", metavar="METHOD")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="Of the video's tokens M, as in 1/8. Default: 1, on a CPU 1/32.", metavar="FRACTION"),
    ] = None,
    device: Device = "cpu",
    rounds: Annotated[int | None, typer.Option(help="Calls of each kind that count. Default: 20.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="480p, 3 rounds, on a CPU 1/128 of M: a look, not the measure.")
    ] = False,
    report: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: .png, .svg or .pdf.", metavar="FILE")] = None,
) -> None:
    """Wan2.2's matrix products: torch's BF16 linear (FP32 on a CPU that emulates BF16) beside each method, quantizing and
    multiplying apart and together.

    In each round every call is made once, so that all see the same machine. Results are checked against the reference in
    the same run, and rates are held against what a copy and a square matrix product reach in the same run.

        mxdit bench gemm --device npu --json npu.json --plot npu.png

        mxdit bench gemm --clip 480p --scale 1/64 --method mxfp4

        mxdit bench gemm --shape 19800,5120,15360 --device cuda

    Exit code 1: a result was wrong.
    """
    import torch

    from mxdit.bench import gemm as measure
    from mxdit.bench.ceilings import ceilings
    from mxdit.bench.products import Product, products
    from mxdit.bench.record import report as as_json

    place = torch.device(device_of(device))
    names = _choices("--model", model, PUBLISHED, ("A14B",))
    clips = _choices("--clip", clip, ("480p", "720p"), ("480p",) if quick else ("480p", "720p"))
    methods = _choices("--method", method, NAMES)
    rounds = _rounds(rounds, QUICK_ROUNDS if quick else 20)
    fraction = _fraction(scale or ("1" if place.type != "cpu" else "1/128" if quick else "1/32"))
    _check_outputs(report, plot)
    if shape:
        fraction, wanted = Fraction(1), [Product("given", *_shape(text)) for text in shape]
    else:
        wanted = products([PUBLISHED[name] for name in names], clips, fraction)
    tell("measuring what a copy and a matrix product of torch's reach")
    baseline = say_baseline(device)
    best, rows = ceilings(place, rounds, baseline), []
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as shown:
        bar = shown.add_task("", total=len(wanted))
        for found in measure.run(wanted, methods, place, rounds):
            rows += found
            shown.advance(bar)
    say_machine(device)
    if fraction != 1:
        say(f"M is {fraction} of the video's tokens; small M and the text's 512 tokens are not scaled.")
    say(
        f"Ceilings of this run: copy {best.copy / 1e9:.1f} GB/s read and written; matmul of {best.size}: BF16 "
        f"{best.bf16 / 1e12:.3f} TFLOP/s, FP32 {best.fp32 / 1e12:.3f}. {rounds} rounds; ms are medians.\n"
    )
    head = ("product", "M", "K", "N", "method", "by", "quantize ms", "matmul ms", "whole ms", "min", "IQR")
    kind = baseline.upper()
    table(
        [
            (*head, f"x {kind}", "GB/s", "of copy", "TFLOP/s", f"of {kind} peak", "right"),
            *(gemm_cells(row, best, best.peak(baseline)) for row in rows if row.parts),
        ]
    )
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(f"{row.backend}: {row.note}", []).append(str(row.product))
    say("\n".join(["", *(f"{note}: {'; '.join(dict.fromkeys(sizes))}" for note, sizes in notes.items())]))
    if report is not None:
        settings = {
            "scale": str(fraction),
            "rounds": rounds,
            "quick": quick,
            "inputs": "gaussian",
            "baseline": baseline,
        }
        figures = as_json("gemm", device, settings, [row.to_dict() for row in rows], ceilings=vars(best))
        report.write_text(json.dumps(figures, indent=1) + "\n")
    if plot is not None:
        from mxdit.bench.plot import gemm as draw

        draw(plot, rows, best, f"{device}, M x {fraction}, {rounds} rounds")
    if any(row.right is False for row in rows):
        raise typer.Exit(1)


@bench.command()
def memory(
    directory: Model = "bundled",
    task: Task = "t2v",
    method: Methods = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Add up this model: A14B, TI2V-5B or none; both by default. May be repeated.", metavar="MODEL"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the clip.")] = 4,
    size: Size = None,
    frames: Frames = None,
    device: Device = "cpu",
    scratch: Scratch = None,
    report: Json = None,
) -> None:
    """Memory of a pipeline in every mode, and the totals of Wan2.2-A14B and TI2V-5B from one block of theirs.

    Each mode is loaded in processes of its own. A14B and TI2V-5B are added up, line by line, from what one block of random
    weights and everything around it took, and stand beside the sizes of docs/wan22.md.

        mxdit bench memory --json memory.json

        mxdit bench memory Wan2.2-T2V-A14B-Diffusers --model none --device npu --method mxfp4_dualscale

        mxdit bench memory --model A14B --method mxfp4
    """
    from dataclasses import asdict

    from mxdit.bench import memory as measure
    from mxdit.bench.modes import METHODS
    from mxdit.bench.record import report as as_json
    from mxdit.bench.totals import totals as totals_of

    methods = _choices("--method", method, METHODS)
    names = _choices("--model", model, (*PUBLISHED, "none"), tuple(PUBLISHED))
    opened, request = _clip(directory, task, steps, size, frames)
    device_of(device)
    _check_outputs(report)
    with _room(scratch) as room:
        rows = list(measure.measure(opened, request, methods, room, device, progress))
    totals = []
    for name in names:
        if name != "none":
            with _room(scratch) as room:
                totals += totals_of(name, PUBLISHED[name], methods, room, device, progress)
    say_machine(device)
    say(f"\n{opened.path}, {request.width}x{request.height}, {request.frames} frames, {request.steps} steps; MiB.")
    say("Peaks are of memory that no file backs, over what imports take; weights mapped from files are not in them.")
    accelerator = ("device loading", "device generating") if device != "cpu" else ()
    experts = list(opened.experts)
    head = (
        "mode",
        "files",
        "weights",
        "one expert resident",
        "peak loading",
        "peak generating",
        "peak RSS",
        *accelerator,
    )
    cells: list[tuple[str, ...]] = [(*head, f"{experts[0]} alone: weights", "peak loading")]
    for row in rows:
        figures = (row.files, row.both, row.one, row.loading, row.generating, row.rss)
        counters = (row.device_loading, row.device_generating) if accelerator else ()
        mib = (f"{n / MIB:.1f}" for n in (*figures, *counters, row.expert.model, row.expert.peak))
        cells.append((row.mode, *mib))
    table(cells)
    for name in dict.fromkeys(total.model for total in totals):
        say_totals(name, [total for total in totals if total.model == name])
    if report is not None:
        settings = {"directory": directory, "task": task, "steps": steps, "frames": request.frames}
        figures = [asdict(row) | {"both": row.both, "one": row.one} for row in rows]
        added = [asdict(t) | {"expert": t.expert, "both": t.both, "one": t.one} for t in totals]
        report.write_text(json.dumps(as_json("memory", device, settings, figures, totals=added), indent=1) + "\n")


@bench.command()
def load(
    directory: Model = "bundled",
    task: Task = "t2v",
    method: Methods = None,
    rounds: Annotated[int, typer.Option(help="Loads that count, after the first one in each process.")] = 5,
    device: Device = "cpu",
    scratch: Scratch = None,
    report: Json = None,
) -> None:
    """Seconds that a pipeline takes to load: BF16, quantized online, and loaded quantized (offline).

    Each mode has a fresh process, whose first load, with the libraries' imports, is told apart. The files are in the system's
    cache, and on a CPU those that are stored quantized are mapped.

        mxdit bench load

        mxdit bench load Wan2.2-T2V-A14B-Diffusers --rounds 1 --method mxfp4 --scratch /data --device npu
    """
    from dataclasses import asdict

    from mxdit.bench import load as measure
    from mxdit.bench.modes import METHODS
    from mxdit.bench.record import report as as_json

    methods = _choices("--method", method, METHODS)
    rounds = _rounds(rounds, rounds)
    opened = _open(directory, task)
    device_of(device)
    _check_outputs(report)
    with _room(scratch) as room:
        rows = list(measure.run(opened, task, methods, rounds, room, device, progress))
    say_machine(device)
    cells: list[tuple[str, ...]] = [("mode", "files MB", "first s", "median s", "min", "IQR")]
    for row in rows:
        seconds = (row.first, row.times.median, row.times.minimum, row.times.spread)
        cells.append((row.mode, f"{row.files / 1e6:.1f}", *(f"{s:.3f}" for s in seconds)))
    table(cells)
    if report is not None:
        figures = [asdict(row) for row in rows]
        settings = {"directory": directory, "task": task, "rounds": rounds}
        report.write_text(json.dumps(as_json("load", device, settings, figures), indent=1) + "\n")


@bench.command()
def pipeline(
    directory: Model = "bundled",
    task: Task = "t2v",
    mode: Annotated[
        list[str] | None,
        typer.Option(help=f"Only the baseline and this: {', '.join(NAMES)}. May be repeated.", metavar="MODE"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a clip, at least 2; the first does not count.")] = 9,
    size: Size = None,
    frames: Frames = None,
    block: Annotated[
        str | None, typer.Option(help="One block of random weights instead: A14B or TI2V-5B.", metavar="MODEL")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Video tokens that the block sees.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Forwards of the block that count.")] = 5,
    device: Device = "cpu",
    report: Json = None,
) -> None:
    """Seconds of a denoising step in every mode, split into linears, attention and the rest by torch's profiler.

    Seconds are taken without the profiler, the shares with it. Where the model does not fit, --block measures one block
    of its shape; 480p clips of 81 frames have 32760 tokens in A14B.

        mxdit bench pipeline --steps 5

        mxdit bench pipeline Wan2.2-T2V-A14B-Diffusers --mode mxfp4_dualscale --device npu

        mxdit bench pipeline --block A14B --tokens 32760 --device cuda
    """
    from dataclasses import asdict

    from mxdit.bench import pipeline as measure
    from mxdit.bench.record import report as as_json

    modes = _choices("--mode", mode, NAMES)
    if block is not None:
        _choices("--block", [block], PUBLISHED)
        if not 1 <= tokens <= 1 << 20:
            raise InputError("no such number of tokens", where="--tokens", got=tokens, expected="1 to 1048576")
        rounds = _rounds(rounds, rounds)
        need("diffusers")
    elif steps < 2:
        raise InputError("the first step does not count", where="--steps", got=steps, expected="at least 2")
    _check_outputs(report)
    device_of(device)
    modes = (baseline := say_baseline(device), *modes)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    if block is not None:
        what, settings = f"one block of {PUBLISHED[block].name}, {tokens} tokens", {"block": block, "tokens": tokens}
        progress(what)
        rows = measure.run_block(PUBLISHED[block], tokens, modes, rounds, device)
    else:
        opened, request = _clip(directory, task, steps, size, frames)
        what = f"{opened.path}, {request.width}x{request.height}, {request.frames} frames; a step"
        settings = {"directory": directory, "task": task, "steps": steps, "frames": request.frames}
        rows = list(measure.run(opened, request, modes, device, progress))
    say_machine(device)
    say(f"{what}; ms. Shares are the profiler's, seconds are without it.")
    cells: list[tuple[str, ...]] = [("mode", "median", "min", "IQR", "rounds", "linear", "attention", "rest")]
    cells[0] += (f"x {baseline.upper()}",)
    for row in rows:
        shares = (f"{1e3 * row.times.median * s:.1f} ({s:.0%})" for s in (row.linear, row.attention, row.rest))
        times = (f"{1e3 * s:.1f}" for s in (row.times.median, row.times.minimum, row.times.spread))
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells.append((row.mode, *times, str(row.times.rounds), *shares, ratio))
    table(cells)
    if report is not None:
        settings["baseline"] = baseline
        figures = [asdict(row) | {"rest": row.rest} for row in rows]
        report.write_text(json.dumps(as_json("pipeline", device, settings, figures), indent=1) + "\n")


# -- what is typed -------------------------------------------------------------------------------------------------------


def _choices(
    option: str,
    given: Sequence[str] | None,
    known: Sequence[str] | Mapping[str, Any],
    default: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """What was named, or all that is known, or a narrower default."""
    wrong = next((name for name in given or () if name not in known), None)
    if wrong is not None:
        raise InputError("no such choice", where=option, got=repr(wrong), expected=" or ".join(known))
    return tuple(dict.fromkeys(given or default or known))


def _rounds(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise InputError("there must be at least one round", where="--rounds", got=given)
    return given or default


def _fraction(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise InputError("not a scale", where="--scale", got=repr(text), expected="a fraction up to 1, such as 1/8")
    return value


def _shape(text: str) -> tuple[int, int, int, int]:
    """(M, K, N, M) of "M,K,N"."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts) or int(parts[1]) % 2:
        raise InputError("not a product", where="--shape", got=repr(text), expected="M,K,N, positive, K even")
    m, k, n = map(int, parts)
    return m, k, n, m


def _open(directory: str, task: str) -> Any:
    """The pipeline's directory, for a task that it can do."""
    from mxdit import pipelines

    need("diffusers", "transformers")
    _choices("--task", [task], pipelines.PIPELINES)
    opened = pipelines.open_model(pipelines.bundled(task) if directory == "bundled" else Path(directory))
    if task not in opened.tasks:
        raise InputError("the model has another task", where="--task", got=task, expected=" or ".join(opened.tasks))
    return opened


def _clip(directory: str, task: str, steps: int, size: str | None, frames: int | None) -> tuple[Any, Any]:
    """The directory and a request for it: a gray first frame for I2V, whose content changes neither bytes nor seconds."""
    from PIL import Image

    from mxdit.generate import make_request

    opened = _open(directory, task)
    preset = opened.preset(task)
    wanted = preset.size if size is None else size_of(size)
    image = Image.new("RGB", (wanted[1], wanted[0]), "gray") if task == "i2v" else None
    prompt = preset.prompt or PROMPT
    return opened, make_request(opened, task, prompt=prompt, image=image, size=wanted, frames=frames, steps=steps)


def _check_outputs(report: Path | None, plot: Path | None = None) -> None:
    if report is not None:
        check_output(report, ".json")
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise InputError("no such kind of picture", where="--plot", got=str(plot), expected=".png, .svg or .pdf")
        try:
            need("matplotlib")
        except InputError:
            hint = "Install what reports need: pip install 'mxdit[eval]'."
            raise InputError("a package is not installed", where="matplotlib", hint=hint) from None
        check_output(plot)


@contextmanager
def _room(scratch: Path | None) -> Iterator[Path]:
    if scratch is not None and not scratch.is_dir():
        raise InputError("no such directory", where=str(scratch), hint="Create it first.")
    with tempfile.TemporaryDirectory(dir=scratch) as room:
        yield Path(room)
