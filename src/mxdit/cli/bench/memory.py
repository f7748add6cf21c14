"""`mxdit bench memory`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mxdit.bench.modes import METHODS
from mxdit.bench.shapes import PUBLISHED
from mxdit.cli.bench.options import (
    Json,
    Methods,
    Scratch,
    Task,
    bench,
    check_outputs,
    choices,
    clip,
    open_session,
    scratch_room,
)
from mxdit.cli.bench.tables import MIB, progress, say_machine, say_totals, table
from mxdit.cli.console import Device, Frames, Model, Size, device_of, say


@bench.command()
def memory(
    directory: Model = "bundled",
    task: Task = None,
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
    from mxdit.bench.record import report as as_json
    from mxdit.bench.totals import totals as totals_of

    methods = choices("--method", method, METHODS)
    names = choices("--model", model, (*PUBLISHED, "none"), tuple(PUBLISHED))
    session = open_session(directory, task)
    request = clip(session, steps, size, frames)
    device_of(device)
    check_outputs(report)
    with scratch_room(scratch) as room:
        rows = list(measure.measure(session.model, request, methods, room, device, progress))
    totals = []
    for name in names:
        if name != "none":
            with scratch_room(scratch) as room:
                totals += totals_of(name, PUBLISHED[name], methods, room, device, progress)
    say_machine(device)
    say(
        f"\n{session.model.path}, {request.width}x{request.height}, {request.frames} frames, {request.steps} steps; MiB."
    )
    say("Peaks are of memory that no file backs, over what imports take; weights mapped from files are not in them.")
    accelerator = ("device loading", "device generating") if device != "cpu" else ()
    experts = list(session.model.components)
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
        settings = {"directory": directory, "task": session.task, "steps": steps, "frames": request.frames}
        figures = [asdict(row) | {"both": row.both, "one": row.one} for row in rows]
        added = [asdict(t) | {"expert": t.expert, "both": t.both, "one": t.one} for t in totals]
        report.write_text(json.dumps(as_json("memory", device, settings, figures, totals=added), indent=1) + "\n")
