"""How the numbers of `mxdit bench` are shown: Markdown tables, to be pasted into a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxdit.bench.shapes import PUBLISHED
from mxdit.cli.console import say, tell

MIB, GIB = 2**20, 2**30


def progress(what: str) -> None:
    tell(f"  {what}")


def say_machine(device: str) -> None:
    from mxdit.backends.environment import environment

    where = environment(device)
    versions = f"mxdit {where['packages']['mxdit']}, torch {where['packages']['torch']}"
    say(f"{where['device_name']}, {where['threads']} threads; {where['backend']}: {where['about']}; {versions}")


def say_baseline(device: str) -> str:
    """What speed is compared with on that device, "bf16" or "fp32"; says why it is FP32 where it is."""
    from mxdit.backends.carrier import note
    from mxdit.bench.modes import CARRIERS, baseline

    if why := note(CARRIERS["bf16"], device):
        say(f"Compared with FP32: {why}.")
    return baseline(device)


def gemm_cells(row: Any, best: Any, peak: float) -> tuple[str, ...]:
    product, cells = row.product, [row.product.name, *map(str, (row.product.m, row.product.k, row.product.n))]
    cells += [row.method, row.backend.partition(" ")[0]]
    cells += [
        _ms(row.parts[part].times.median) if part in row.parts else "-" for part in ("quantize", "matmul", "whole")
    ]
    whole = row.parts["whole"]
    times = whole.times
    moved, done = whole.nbytes / times.median, product.operations / times.median
    cells += [_ms(times.minimum), _ms(times.spread), f"{row.ratio:.2f}"]
    cells += [f"{moved / 1e9:.1f}", f"{moved / best.copy:.0%}", f"{done / 1e12:.3f}", f"{done / peak:.0%}"]
    return (*cells, {True: "yes", False: "NO", None: "-"}[row.right])


def say_operations(rows: Sequence[Any], best: Any) -> None:
    """A table for each mode: the operations of the profiled forward, most time above the floor first."""
    say(
        f"\nCeilings of this run: copy {best.copy / 1e9:.1f} GB/s read and written; matmul of {best.size}: BF16 "
        f"{best.bf16 / 1e12:.3f} TFLOP/s, FP32 {best.fp32 / 1e12:.3f}. Rows with ~ are parts, measured alone."
    )
    for row in rows:
        if not row.operations:
            continue  # compiled
        forward = sum(each.seconds for each in row.operations if each.part_of is None)
        say(
            f"\n{row.mode}: {1e3 * forward:.1f} ms, each operation's quickest; linears at best {row.peak / 1e12:.3f} TFLOP/s\n"
        )
        head = ("operation", "ms", "share", "MB", "GFLOP", "floor ms", "over floor", "ms above")
        cells: list[tuple[str, ...]] = [head]
        for each in row.operations:
            cell = (f"{each.nbytes / 1e6:.1f}", f"{each.flop / 1e9:.3g}", f"{1e3 * each.floor:.2f}")
            cell += (f"{each.seconds / each.floor:.2f}" if each.floor else "-",)
            cell += (f"{1e3 * (each.seconds - each.floor):.2f}",)
            name = each.name if each.part_of is None else f"~ {each.name}"
            cells.append((name, f"{1e3 * each.seconds:.2f}", f"{each.share:.1%}", *cell))
        table(cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def say_totals(name: str, totals: Sequence[Any]) -> None:
    """The arithmetic of every mode, then its sums beside what docs/wan22.md says."""
    say(f"\n{PUBLISHED[name].name}, from one block as it was loaded; MiB = bytes / 2^20, GiB = bytes / 2^30.\n")
    for total in totals:
        terms = [
            f"{line.what}: {line.count:,} x {_unit(line.each)} = {line.nbytes / MIB:,.1f} MiB" for line in total.lines
        ]
        say(f"{total.mode}: {'; '.join(terms)}; one expert {total.expert / GIB:.2f} GiB")
    rest = [f"{line.what}: {line.count:,} x {line.each} B = {line.nbytes / GIB:.2f} GiB" for line in totals[0].others]
    say(f"beside the experts ({totals[0].experts}): {'; '.join(rest)}\n")
    head = ("mode", "one expert GiB", "published", "differs", "peak loading it", "pipeline GiB", "published", "differs")
    cells: list[tuple[str, ...]] = [(*head, "one expert resident GiB", "published", "differs")]
    for t in totals:
        pairs = ((t.expert, t.published), (t.both, t.published_both), (t.one, t.published_one))
        first, both, one = (_against(nbytes, known) for nbytes, known in pairs)
        cells.append((t.mode, *first, f"{t.loading / GIB:.2f}", *both, *one))
    table(cells)


def _unit(nbytes: int) -> str:
    return f"{nbytes / MIB:,.2f} MiB"


def _against(nbytes: int, published: float | None) -> tuple[str, str, str]:
    gib = nbytes / GIB
    return (
        (f"{gib:.2f}", "-", "-")
        if published is None
        else (f"{gib:.2f}", f"{published:g}", f"{gib / published - 1:+.1%}")
    )


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Markdown, aligned, lines as long as they have to be: to be pasted into a report."""
    lines = aligned(rows)
    lines.insert(1, ["-" * len(lines[0][0]), *("-" * (len(cell) - 1) + ":" for cell in lines[0][1:])])
    for line in lines:
        say(f"| {' | '.join(line)} |")


def aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells padded to the width of their column, the first one's to the right, all others' to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
