"""What calibrating one block of Wan2.2-A14B takes: seconds and memory of every phase, and FLOP by formula.

Runs `mxdit.calibrate.linears.calibrate` on the groups of linears of a block (d=5120, f=13824) with as many rows of input as a
calibration keeps of them. Weights and inputs are random: related channels, some large, GELU's one-sided tail in front of
ffn.net.2, text that is padding for the most part. So times are the real ones, and errors are not. Each group has a process of
its own; a phase is timed without those inside it, and memory is what no file backs, over what imports take.

    python benchmarks/calibrate_block.py [--groups attn1.qkv ffn.net.2] [--method mxfp4_dualscale] [--device cpu]
                                         [--rows 27648] [--dim 5120] [--ffn 13824] [--threads 1] [--json FILE]

With --rows fewer rows are kept, and the phase that goes through all of them is scaled up where a whole model is spoken of; groups
that are left out count by one of as many channels, phase by phase. What it says of an H200 is arithmetic on the data sheet: it
was not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mxdit.backends.environment import environment
from mxdit.bench.processes import alone
from mxdit.bench.shapes import A14B, TEXT_TOKENS, Wan
from mxdit.calibrate import linears, scales, smooth
from mxdit.calibrate.gptq import gptq
from mxdit.calibrate.linears import CHUNK, SEARCHED, Calibrated, Recipe, calibrate
from mxdit.calibrate.observe import HELD_ROWS, ROWS_PER_CHANNEL, SEARCH_ROWS, STATES
from mxdit.calibrate.results import LEAST
from mxdit.generation.memory import counters, status
from mxdit.numerics.formats import FORMATS, block_format

MIB, GIB = 2**20, 2**30
STD = 0.02  # of weights
RELATED = 64  # directions that all channels share
CANDIDATES = 1 + len(smooth.STATISTICS) * len(smooth.EXPONENTS)
REST = "rest"
PHASES = ("exact", "online", "smooth", "hessian", "search", "factor", "gptq", "refit", "acceptance", REST)
HOST_LIMIT, DEVICE_LIMIT, MINUTES = 24 * GIB, 20 * GIB, 60  # what an expert is to stay within

# NVIDIA's data sheet of the H200 SXM, dense: FP32 67, TF32 494, BF16 989 TFLOP/s; 4.8 TB/s. torch multiplies FP32 in FP32.
H200 = {"FP32": 67e12, "TF32": 494e12, "BF16": 989e12, "bytes": 4.8e12}
EFFICIENCY = 0.5  # of those peaks, assumed
FORWARDS = 80  # of a clip: 40 steps with guidance
LAUNCH = 8e-6  # seconds that the host needs for one operator, assumed


@dataclass(frozen=True)
class Shape:
    """Linears that share an input, `count` of (n, k), and what that input looks like."""

    name: str
    count: int
    n: int
    k: int
    kind: str = "video"

    @property
    def rows(self) -> int:
        """Of input, as a calibration keeps them to learn from."""
        return max(SEARCH_ROWS, ROWS_PER_CHANNEL * self.k)


def shapes(wan: Wan) -> dict[str, Shape]:
    """The groups of a block, in the order in which they run."""
    d, f = wan.dim, wan.ffn
    rows = (
        Shape("attn1.qkv", 3, d, d), Shape("attn1.to_out", 1, d, d), Shape("attn2.to_q", 1, d, d),
        Shape("attn2.kv", 2, d, d, "text"), Shape("attn2.to_out", 1, d, d), Shape("ffn.net.0.proj", 1, f, d),
        Shape("ffn.net.2", 1, d, f, "gelu"),
    )  # fmt: skip
    return {row.name: row for row in rows}


# -- by formula ----------------------------------------------------------------------------------------------------------


def flop(shape: Shape, rows: int, method: str) -> dict[str, float]:
    """FLOP of the products in one call of each phase; for `factor` Cholesky, the inverse and Cholesky again."""
    n, k, held = shape.count * shape.n, shape.k, HELD_ROWS
    span = block_format(method).outer or 512
    edges = [*range(0, k, span), k]
    # What is still to come of a weight is brought up to date behind each block of 32, and behind each span.
    behind = sum(
        2 * (min(at + 32, stop) - at) * (stop - min(at + 32, stop))
        for start, stop in pairwise(edges)
        for at in range(start, stop, 32)
    ) + sum(2 * (stop - start) * (k - stop) for start, stop in pairwise(edges))
    return {
        "exact": 2.0 * held * k * n,
        "smooth": 2.0 * min(SEARCHED, rows) * k * n * (CANDIDATES + 1),
        "hessian": 2.0 * rows * k * k,
        "factor": 4 / 3 * k**3,
        "gptq": float(n * behind),
        "refit": 2.0 * n * k * k,
        "acceptance": 2.0 * held * k * shape.n,
    }


def accounting(shape: Shape, rows: int) -> dict[str, int]:
    """Bytes that are held at once, at most, by formula: throughout, and what a phase adds to that."""
    n, k = shape.count * shape.n, shape.k
    square, whole = 4 * k * k, 4 * n * k  # fp32: a matrix of all channels, and the weights of all members
    return {
        "fit": 2 * rows * k,
        "held, weights, what they give": 2 * HELD_ROWS * k + whole // 2 + 4 * HELD_ROWS * n,
        "smooth": whole // 2 + 3 * whole,  # the members below each other, fp32, divided, and divided by scales
        "hessian": square + 3 * 4 * min(CHUNK, rows) * k,
        "search": square + 3 * whole,
        "factor": 3 * square + whole,  # H; of its sum with the damping, L, the inverse and U two at a time
        "gptq": 2 * square + 4 * whole,  # H, U; the weight, its transpose, its codes, one update
        "refit": square + 4 * whole,  # H; the weight, its codes, their product, one more
    }


class Counted(TorchDispatchMode):
    """Counts operators that compute, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operators += 1
            self.bytes += sum(t.nbytes for t in (*args, out) if isinstance(t, Tensor))
        return out


def counted(method: str) -> dict[str, tuple[float, float]]:
    """Of `search` and `gptq`: operators for each channel, and bytes for each element of the weight."""
    found, width, n = {}, 512, 256
    for name in ("search", "gptq"):
        ends = []
        for k in (width, 2 * width):
            weight, hessian = torch.randn(n, k), torch.eye(k)
            with Counted() as mode:
                if name == "search":
                    scales.search(weight, hessian.diagonal(), method)
                else:
                    gptq(weight, hessian, hessian, method)
            ends.append((mode.operators, mode.bytes))
        (few, little), (many, much) = ends
        found[name] = (many - few) / width, (much - little) / (width * n)
    return found


def on_h200(shape: Shape, method: str, calls: Mapping[str, int], counts: Mapping[str, tuple[float, float]]) -> float:
    """Seconds of a group on an H200, by arithmetic alone: products at `EFFICIENCY`, all else by launches or bytes."""
    per_call, n = flop(shape, shape.rows, method), shape.count * shape.n
    rate = {"smooth": "BF16", "acceptance": "BF16"}  # the layer's own products; the others are fp32
    seconds = sum(
        calls.get(phase, 0) * of / (EFFICIENCY * H200[rate.get(phase, "FP32")]) for phase, of in per_call.items()
    )
    for phase, (operators, traffic) in counts.items():
        moved = traffic * n * shape.k / (EFFICIENCY * H200["bytes"])
        seconds += calls.get(phase, 0) * max(operators * shape.k * LAUNCH, moved)
    return seconds


# -- by measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """What one phase took: calls, seconds of the wall's clock and of this process, the most bytes over the baseline."""

    calls: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    host: int = 0
    device: int = 0


@dataclass
class Clock:
    """Credits time and memory to the innermost of the phases that are going on."""

    where: torch.device
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in PHASES})
    stack: list[str] = field(default_factory=lambda: [REST])
    baseline: int = 0

    def __post_init__(self) -> None:
        self._counters, self._stop = counters(str(self.where)), threading.Event()
        self._at = (time.perf_counter(), time.process_time())

    def _look(self) -> None:
        phase = self.phases[self.stack[-1]]
        phase.host = max(phase.host, status("RssAnon") - self.baseline)

    def _turn(self) -> None:
        if self._counters is not None:
            self._counters.synchronize(self.where)
        now, phase = (time.perf_counter(), time.process_time()), self.phases[self.stack[-1]]
        phase.wall, phase.cpu = phase.wall + now[0] - self._at[0], phase.cpu + now[1] - self._at[1]
        self._look()
        if self._counters is not None:
            phase.device = max(phase.device, self._counters.max_memory_allocated(self.where))
            self._counters.reset_peak_memory_stats(self.where)
        self._at = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as that phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self.stack.append(name)
            self.phases[name].calls += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self.stack.pop()

        return call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the phases of a calibration are counted, and memory is looked at."""

        def watch() -> None:
            while not self._stop.wait(0.005):
                self._look()

        places: list[tuple[Any, str, str]] = [
            (linears._Group, "__init__", "exact"),
            (linears._Group, "_rounded", "online"),
            (linears._Group, "_smoothed", "smooth"),
            (linears._Group, "_hessian", "hessian"),
            (linears._Group, "_error", "acceptance"),
            (linears, "inverse_factor", "factor"),
            (linears, "gptq", "gptq"),
            (scales, "search", "search"),
            (scales, "refit", "refit"),
        ]
        thread = threading.Thread(target=watch, daemon=True)
        with ExitStack() as patches:
            for place, name, phase in places:
                patches.enter_context(mock.patch.object(place, name, self.timed(phase, getattr(place, name))))
            self._at = (time.perf_counter(), time.process_time())
            thread.start()
            try:
                yield
            finally:
                self._turn()
                self._stop.set()
                thread.join()


def inputs(shape: Shape, rows: int, generator: torch.Generator) -> Tensor:
    """(rows, K) BF16: related channels of heavy-tailed sizes, a few far larger than the rest."""
    k = shape.k
    shared = torch.randn(RELATED, k, generator=generator) / RELATED**0.5
    size = torch.randn(k, generator=generator).exp() * torch.where(
        torch.rand(k, generator=generator) < 0.005, 30.0, 1.0
    )
    padding = torch.randn(k, generator=generator)
    x = torch.empty(rows, k, dtype=torch.bfloat16)
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        part = torch.randn(count, k, generator=generator).mul_(0.5)
        part.addmm_(torch.randn(count, RELATED, generator=generator), shared)
        if shape.kind == "gelu":
            part = nn.functional.gelu(part)
        if shape.kind == "text":  # eleven words, and what the encoder makes of padding
            part = torch.where(torch.rand(count, 1, generator=generator) < 11 / TEXT_TOKENS, part, padding)
        x[first : first + count] = part * size
    return x


def measure(shape: Shape, rows: int, method: str, device: str, threads: int) -> dict[str, Any]:
    """Calibrate a group in this process, which is best a fresh one (`alone`), and say what that took."""
    torch.set_num_threads(threads)
    generator, where = torch.Generator().manual_seed(0), torch.device(device)
    recipe = Recipe(method, "mxfp8" if method == "mxfp8" else "mxfp4")
    small = replace(shape, n=64, k=512)  # first, for what imports and allocators take once in a process
    group(small, 1024, recipe, where, generator)
    clock = Clock(where, baseline=status("RssAnon"))
    results, whole = group(shape, rows, recipe, where, generator, clock)
    return {
        "group": shape.name, "members": shape.count, "n": shape.n, "k": shape.k, "rows": rows, "rows_full": shape.rows,
        "wall": whole[0], "cpu": whole[1],
        "phases": {name: asdict(phase) for name, phase in clock.phases.items()},
        "flop": flop(shape, rows, method), "accounting": accounting(shape, rows),
        "steps": {p: [f"{t.step} {'+' if t.kept else '-'} {t.error:.5f}" for t in r.trials] for p, r in results.items()},
    }  # fmt: skip


def group(
    shape: Shape, rows: int, recipe: Recipe, where: torch.device, generator: torch.Generator, clock: Clock | None = None
) -> tuple[dict[str, Calibrated], tuple[float, float]]:
    """One group calibrated: its results, and the seconds of the wall's clock and of the process."""
    members = {f"{shape.name}.{i}": nn.Linear(shape.k, shape.n, device="meta") for i in range(shape.count)}
    for linear in members.values():
        linear.bfloat16().to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.normal_(std=STD, generator=generator)
            linear.bias.normal_(generator=generator)
    fit, held = (inputs(shape, count, generator) for count in (rows, HELD_ROWS))
    started = time.perf_counter(), time.process_time()
    with ExitStack() as stack:
        if clock is not None:
            stack.enter_context(clock.running())
        results = calibrate(members, fit.to(where), held.to(where), recipe)
    return results, (time.perf_counter() - started[0], time.process_time() - started[1])


# -- what is printed -----------------------------------------------------------------------------------------------------


def scaled(row: Mapping[str, Any], shape: Shape) -> float:
    """Seconds of the CPU for a group with all of its rows, by one of as many channels: itself, or one of other sizes.

    The Hessian's grow with rows, the factor's stay the same, all others grow with the weights.
    """
    phases = row["phases"]
    hessian, factor = phases["hessian"]["cpu"], phases["factor"]["cpu"]
    others = (row["cpu"] - hessian - factor) * shape.count * shape.n / (row["members"] * row["n"])
    return hessian * shape.rows / row["rows"] + factor + others


def table(row: Mapping[str, Any]) -> str:
    lines = [("phase", "calls", "wall s", "CPU s", "GFLOP", "GFLOP/s", "host MiB", "by formula", "device MiB")]
    account = row["accounting"]
    held = account["fit"] + account["held, weights, what they give"]
    for name, phase in row["phases"].items():
        if not phase["calls"] and name != REST:
            continue
        work = row["flop"].get(name, 0.0) * phase["calls"] / 1e9
        lines.append((
            name, str(phase["calls"] or ""), f"{phase['wall']:.1f}", f"{phase['cpu']:.1f}",
            f"{work:.0f}" if work else "", f"{work / phase['cpu']:.0f}" if work and phase["cpu"] else "",
            f"{phase['host'] / MIB:.0f}", f"{(held + account[name]) / MIB:.0f}" if name in account else "",
            f"{phase['device'] / MIB:.0f}" if phase["device"] else "",
        ))  # fmt: skip
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def summary(rows: Sequence[Mapping[str, Any]], wan: Wan, method: str) -> str:
    """What all groups come to for a model, here and by arithmetic on an H200."""
    counts, by_name, by_width = counted(method), {r["group"]: r for r in rows}, {r["k"]: r for r in reversed(rows)}
    lines = [("group", "K", "N", "rows", "CPU s", "host peak MiB", "PFLOP", "H200 s, arithmetic")]
    here = there = 0.0
    for name, shape in shapes(wan).items():
        row = by_name.get(name) or by_width.get(shape.k)
        if row is None:
            continue
        own = name in by_name
        calls = {name: phase["calls"] for name, phase in row["phases"].items()}
        work = sum(calls.get(name, 0) * of for name, of in flop(shape, shape.rows, method).items())
        mine, theirs = scaled(row, shape), on_h200(shape, method, calls, counts)
        here, there = here + mine, there + theirs
        peak = max(phase["host"] for phase in row["phases"].values())
        lines.append((
            name, str(shape.k), f"{shape.count} x {shape.n}",
            f"{row['rows']} of {shape.rows}" if own else f"as {row['group']}", f"{mine:.1f}",
            f"{peak / MIB:.0f}" if own else "", f"{work / 1e15:.4f}", f"{theirs:.2f}",
        ))  # fmt: skip
    lines.append(("all of these", "", "", "", f"{here:.1f}", "", "", f"{there:.2f}"))
    host = max(phase["host"] for row in rows for phase in row["phases"].values())
    device = max(phase["device"] for row in rows for phase in row["phases"].values())
    said = [
        aligned(lines),
        f"\n{wan.blocks} blocks x {wan.experts} experts here: {here * wan.blocks * wan.experts / 3600:.1f} h of this CPU's time.",
        f"On one H200, by arithmetic and not measured: {there * wan.blocks / 60:.1f} minutes an expert for its linears "
        f"(aim: {MINUTES} for all). Assumed: {EFFICIENCY:.0%} of 67 TFLOP/s FP32 and of 989 TFLOP/s BF16 dense, "
        f"{EFFICIENCY:.0%} of 4.8 TB/s, {LAUNCH * 1e6:.0f} us for an operator. "
        + "; ".join(
            f"{name}: {o:.1f} operators a channel, {b:.0f} bytes an element" for name, (o, b) in counts.items()
        ),
        *(clips(wan, clip) for clip in wan.clips),
        f"Peak of host memory: {host / GIB:.1f} GiB for a group (aim: {HOST_LIMIT / GIB:.0f} for all that there is).",
    ]
    if device:
        said.append(f"Peak of device memory: {device / GIB:.1f} GiB (aim: {DEVICE_LIMIT / GIB:.0f}).")
    return "\n".join(said)


def clips(wan: Wan, clip: str) -> str:
    """What making clips takes on an H200, by arithmetic: the text encoder and the VAE left out."""
    m = wan.tokens(clip)
    linear = sum(2 * rows * layer.k * layer.n * layer.count for rows, layer in wan.gemms(m))
    forward = wan.blocks * (linear + 4 * m * (m + TEXT_TOKENS) * wan.dim)
    minutes = forward * FORWARDS / (EFFICIENCY * H200["BF16"]) / 60
    kept = m * wan.dim * 2
    calls = max(LEAST, STATES // kept)
    return (
        f"{clip}: {forward / 1e15:.2f} PFLOP a forward, {minutes:.1f} minutes a clip of {FORWARDS} on one H200, by arithmetic; "
        f"a block gives {kept / MIB:.0f} MiB to a call, {calls * kept / GIB:.1f} GiB to the {calls} that are learned from."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=shapes(A14B), default=list(shapes(A14B)))
    parser.add_argument("--method", choices=FORMATS, default="mxfp4_dualscale")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="of input to learn from, at most (default: eight for each channel)")
    parser.add_argument("--dim", type=int, default=A14B.dim)
    parser.add_argument("--ffn", type=int, default=A14B.ffn)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers and the machine there as well")
    args = parser.parse_args()
    wan, rows = replace(A14B, dim=args.dim, ffn=args.ffn), list[dict[str, Any]]()
    for name in args.groups:
        shape = shapes(wan)[name]
        kept = min(shape.rows, args.rows or shape.rows)
        rows.append(alone(measure, shape, kept, args.method, args.device, args.threads))
        print(
            f"{name}: {shape.count} x ({shape.n}, {shape.k}), {kept} of {shape.rows} rows\n{table(rows[-1])}\n",
            flush=True,
        )
    print(summary(rows, wan, args.method))
    if args.json:
        numbers = {"environment": environment(args.device), "options": {**vars(args), "json": None}, "rows": rows}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
