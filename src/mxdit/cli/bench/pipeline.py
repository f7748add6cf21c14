"""`mxdit bench pipeline`."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from mxdit.bench.modes import MODES
from mxdit.bench.shapes import PUBLISHED
from mxdit.cli.bench.options import Json, Task, bench, check_outputs, choices, clip, open_session, rounds_of
from mxdit.cli.bench.tables import progress, say_baseline, say_machine, say_operations, table
from mxdit.cli.console import Attention, Device, Frames, Model, Size, attention_of, device_of, need, say
from mxdit.errors import InputError


@bench.command()
def pipeline(
    directory: Model = "bundled",
    task: Task = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help=f"Only the baseline and this: {', '.join(MODES)}. May be repeated.", metavar="MODE"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a clip, at least 2; the first does not count.")] = 9,
    size: Size = None,
    frames: Frames = None,
    block: Annotated[
        str | None, typer.Option(help="One block of random weights instead: A14B or TI2V-5B.", metavar="MODEL")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Video tokens that the block sees.")] = 1024,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Clips of each mode, in turn, with all modes in memory at once; or forwards of the block, also in turn.",
            show_default="one mode after the other; 5 forwards",
        ),
    ] = None,
    attention: Attention = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks of the modes; not those of the baseline.")
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="Norms, rotary embeddings and GELU of the modes in one pass each.")
    ] = False,
    device: Device = "cpu",
    report: Json = None,
) -> None:
    """Seconds of a denoising step in every mode, split into linears, attention and the rest by torch's profiler.

    Seconds are taken without the profiler, the shares with it. Where the model does not fit, --block measures one block
    of its shape; 480p clips of 81 frames have 32760 tokens in A14B. It is split by operation too, each beside the least
    that it has to move and compute, at what a copy and a matrix product reach in the same run.

        mxdit bench pipeline --steps 5

        mxdit bench pipeline --mode mxfp4 --attention exact --fused --rounds 20

        mxdit bench pipeline Wan2.2-T2V-A14B-Diffusers --mode mxfp4_dualscale --device npu

        mxdit bench pipeline --block A14B --tokens 4096 --mode mxfp4 --attention exact

        mxdit bench pipeline --block A14B --tokens 32760 --device cuda

    --attention, --compile and --fused are for the modes; the baseline stays as diffusers has it.
    """
    from dataclasses import asdict

    import torch

    from mxdit.bench import pipeline as measure
    from mxdit.bench.ceilings import ceilings
    from mxdit.bench.record import report as as_json
    from mxdit.config.attention import DEFAULT, AttentionPolicy
    from mxdit.generation import loading

    modes = choices("--mode", mode, MODES)
    if block is not None:
        choices("--block", [block], PUBLISHED)
        if not 1 <= tokens <= 1 << 20:
            raise InputError("no such number of tokens", where="--tokens", got=tokens, expected="1 to 1048576")
        need("diffusers")
    elif steps < 2:
        raise InputError("the first step does not count", where="--steps", got=steps, expected="at least 2")
    rounds = rounds_of(rounds, 1 if block is None else 5)
    check_outputs(report)
    device_of(device)
    how = measure.How(attention_of(attention), compiled, fused)
    if block is not None and AttentionPolicy.of_value(how.attention).steps:
        raise InputError("a block has no steps", where="--attention", got=attention)
    modes, best = (baseline := say_baseline(device), *modes), None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    if block is not None:
        what, settings = f"one block of {PUBLISHED[block].name}, {tokens} tokens", {"block": block, "tokens": tokens}
        progress("what a copy and a matrix product of torch's reach")
        best = ceilings(torch.device(device), rounds, baseline)
        progress(what)
        rows = list(measure.run_block(PUBLISHED[block], tokens, modes, rounds, device, best, how))
    else:
        session = open_session(directory, task, attention=how.attention)
        loading.check_attention(session.model, session.attention)
        request = clip(session, steps, size, frames)
        what = f"{session.model.path}, {request.width}x{request.height}, {request.frames} frames; a step"
        settings = {"directory": directory, "task": session.task, "steps": steps, "frames": request.frames}
        settings["rounds"] = rounds
        rows = list(measure.run(session.model, request, modes, device, progress, how, rounds))
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
    if best is not None:
        say_operations(rows, best)
    if report is not None:
        settings |= {"baseline": baseline, "attention": attention or DEFAULT, "compile": compiled, "fused": fused}
        figures = [asdict(row) | {"rest": row.rest} for row in rows]
        ceiled = {} if best is None else {"ceilings": vars(best)}
        report.write_text(json.dumps(as_json("pipeline", device, settings, figures, **ceiled), indent=1) + "\n")
