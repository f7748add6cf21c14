"""`mxdit bench gemm`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mxdit.bench.modes import MODES
from mxdit.bench.shapes import PUBLISHED
from mxdit.cli.bench.options import Json, bench, check_outputs, choices, rounds_of
from mxdit.cli.bench.tables import gemm_cells, say_baseline, say_machine, table
from mxdit.cli.console import Device, device_of, err, say, tell
from mxdit.errors import InputError

QUICK_ROUNDS = 3


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
        list[str] | None, typer.Option(help=f"Only this: {', '.join(MODES)}. May be repeated.", metavar="METHOD")
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
    from mxdit.bench import gemm as measure
    from mxdit.bench.ceilings import ceilings
    from mxdit.bench.products import Product, products
    from mxdit.bench.record import report as as_json

    place = torch.device(device_of(device))
    names = choices("--model", model, PUBLISHED, ("A14B",))
    clips = choices("--clip", clip, ("480p", "720p"), ("480p",) if quick else ("480p", "720p"))
    methods = choices("--method", method, MODES)
    rounds = rounds_of(rounds, QUICK_ROUNDS if quick else 20)
    fraction = fraction_of(scale or ("1" if place.type != "cpu" else "1/128" if quick else "1/32"))
    check_outputs(report, plot)
    if shape:
        fraction, wanted = Fraction(1), [Product("given", *shape_of(text)) for text in shape]
    else:
        wanted = products([PUBLISHED[name] for name in names], clips, fraction)
    tell("measuring what a copy and a matrix product of torch's reach")
    baseline = say_baseline(device)
    best, rows = ceilings(place, rounds, baseline), []
    settings = {
        "scale": str(fraction),
        "rounds": rounds,
        "quick": quick,
        "inputs": "gaussian",
        "baseline": baseline,
    }
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as shown:
        bar = shown.add_task("", total=len(wanted))
        for found in measure.run(wanted, methods, place, rounds):
            rows += found
            shown.advance(bar)
            if report is not None:  # anew, so that a product that takes the process with it leaves the others
                figures = as_json("gemm", device, settings, [row.to_dict() for row in rows], ceilings=vars(best))
                report.write_text(json.dumps(figures, indent=1) + "\n")
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
    if plot is not None:
        from mxdit.bench.plot import gemm as draw

        draw(plot, rows, best, f"{device}, M x {fraction}, {rounds} rounds")
    if any(row.right is False for row in rows):
        raise typer.Exit(1)


def fraction_of(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise InputError("not a scale", where="--scale", got=repr(text), expected="a fraction up to 1, such as 1/8")
    return value


def shape_of(text: str) -> tuple[int, int, int, int]:
    """(M, K, N, M) of "M,K,N"."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts) or int(parts[1]) % 2:
        raise InputError("not a product", where="--shape", got=repr(text), expected="M,K,N, positive, K even")
    m, k, n = map(int, parts)
    return m, k, n, m
