"""`mxdit conformance`."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mxdit.cli.console import app, check_output, device_of, err, say
from mxdit.errors import InputError


@app.command()
def conformance(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, npu, ...")] = "cpu",
    only: Annotated[str, typer.Option(help="Only items whose name has this in it.", metavar="TEXT")] = "",
    report: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything to this file, to attach it to a report.", metavar="FILE"),
    ] = None,
) -> None:
    """Check that a device computes what docs/numerics.md defines, bit for bit, in less than a minute.

    Every op that the device's backend has runs there and, in plain torch, on the CPU: all bf16 patterns through every
    quantizer, special blocks, products and whole linears in Wan2.2's shapes, norms, GELU, attention by each method, and
    a small block of Wan2.2. Each row says how many codes and outputs were compared, how many codes, scales and outputs
    differ, by how many units in the last place at most, and what they were held to (numerics.md, section 8). A failure
    prints a short program that shows it.

        mxdit conformance --device npu --json npu.json

        mxdit conformance --only "quantize mxfp4 uos"

    Exit code 0: nothing failed; what the device refuses, what its backend leaves to the reference, or what cannot be
    run here is counted. 1: something failed. 2: the device cannot be used.
    """
    import torch

    from mxdit import conformance as suite

    device = device_of(device)
    if report is not None:
        check_output(report)
    cases = [case for case in suite.cases() if only in case.name]
    if not cases:
        raise InputError("no item has such a name", where="--only", got=repr(only), hint="Without it, all are listed.")
    with suppress(RuntimeError):  # which is a failure, and will be one; a BackendError is about the device as a whole
        torch.ops.mxdit.quantize(torch.ones(1, 64, dtype=torch.bfloat16, device=device), "mxfp4", "ocp", "rint")
    where = suite.environment(device)
    _show_environment(where)

    started = time.perf_counter()
    results, figures = [], {}
    columns = (
        TextColumn("Comparing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(bar, description=case.name)
            results.append(case.run(device))
            progress.advance(bar)
            figures = suite.report(where, results, time.perf_counter() - started)
            if report is not None:  # anew, so that a case that takes the process with it leaves the others
                report.write_text(json.dumps(figures, indent=1) + "\n")
    _show(results)
    counts = figures["totals"]
    verdicts = ", ".join(f"{counts[key]} {key}" for key in (suite.PASS, suite.FAIL, suite.REFUSED, suite.SKIPPED))
    numbers = f"{counts['elements']:,} numbers compared, {figures['seconds']:.1f} s"
    say(f"{counts['items']} items on {device}: {verdicts}; {numbers}")
    if counts[suite.FAIL]:
        raise typer.Exit(1)


def _show_environment(where: dict[str, Any]) -> None:
    say("  ".join(f"{name} {number or 'not installed'}" for name, number in where["packages"].items()))
    say(f"python {where['python']} on {where['system']}; {where['cpu']}, {where['threads']} threads")
    say(f"device {where['device']}: {where['device_name']}; {where['backend']} answers: {where['about']}")
    for backend, reason in where["why_not"].items():
        say(f"{backend} does not answer: {reason}")


def _show(results: list[Any]) -> None:
    """A table, and what there is to say about those that did not pass. Lines are as long as they have to be: a row that is
    folded into a narrow terminal, or cut, is no use in a report."""
    rows: list[tuple[str, ...]] = [("item", "held to", "verdict", "compared", "codes", "scales", "outputs", "ulp")]
    for result in results:
        counts = (result.elements, result.codes, result.scales, result.outputs, result.ulps)
        rows.append((result.name, ", ".join(result.accepted), result.verdict, *(f"{count:,}" for count in counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    say("")
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells))
    say("")
    for result in results:
        if result.reason:
            say(f"{result.verdict}: {result.name}: {result.reason}")
        if result.reproducer:
            say(f"\n{result.reproducer}")
