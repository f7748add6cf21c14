"""`mxdit bench load`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mxdit.bench.modes import METHODS
from mxdit.cli.bench.options import (
    Json,
    Methods,
    Scratch,
    Task,
    bench,
    check_outputs,
    choices,
    open_session,
    rounds_of,
    scratch_room,
)
from mxdit.cli.bench.tables import progress, say_machine, table
from mxdit.cli.console import Device, Model, device_of


@bench.command()
def load(
    directory: Model = "bundled",
    task: Task = None,
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
    from mxdit.bench.record import report as as_json

    methods = choices("--method", method, METHODS)
    rounds = rounds_of(rounds, rounds)
    session = open_session(directory, task)
    device_of(device)
    check_outputs(report)
    with scratch_room(scratch) as room:
        rows = list(measure.run(session.model, session.task, methods, rounds, room, device, progress))
    say_machine(device)
    cells: list[tuple[str, ...]] = [("mode", "files MB", "first s", "median s", "min", "IQR")]
    for row in rows:
        seconds = (row.first, row.times.median, row.times.minimum, row.times.spread)
        cells.append((row.mode, f"{row.files / 1e6:.1f}", *(f"{s:.3f}" for s in seconds)))
    table(cells)
    if report is not None:
        figures = [asdict(row) for row in rows]
        settings = {"directory": directory, "task": session.task, "rounds": rounds}
        report.write_text(json.dumps(as_json("load", device, settings, figures), indent=1) + "\n")
