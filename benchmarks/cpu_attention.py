"""How fast exact attention is on a CPU beside torch's scaled_dot_product_attention, and how far both are from float64.

Calls of torch, of mxdit, and of a torch linear of the same dtype alternate. The linear (as many rows and columns as there are
queries, at most 2048) says how fast this machine multiplies, which attention cannot exceed by much. Ratios are torch over
mxdit, of the medians and of the minima of all rounds; with one thread, of its CPU time. Errors are the root mean square over
sampled queries of the first head. Inputs are Gaussian, in the order of axes that diffusers has: (batch, tokens, heads, width).

    python benchmarks/cpu_attention.py [--path avx2] [--dtype bf16 fp32] [--heads 4] [--threads 2] [--rounds 9] [--json FILE]

    self     4,096 tokens on themselves, heads of 128, as Wan2.2-A14B has 40 of
    cross    4,096 tokens on 512 of text
    causal   4,096 tokens, each on those before it
    padded   4,096 tokens on 512 of text of which a mask leaves 100
    mini     the bundled model's 80 tokens, 4 heads of 64: on themselves and on 512 of text

With a --path that has less than this CPU, torch is held to the same: the script starts itself again with
ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cpu_linear import caption, machine, milliseconds
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from mxdit.backends import native
from mxdit.bench.timing import Call, alternate, timer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HELD = {  # by path: what torch's own kernels and oneDNN's may use
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}
SAMPLE = 128  # queries whose error is taken


@dataclass(frozen=True)
class Case:
    name: str
    queries: int
    keys: int
    width: int = 128
    heads: int | None = None  # None: as the command line says
    causal: bool = False
    seen: int | None = None  # keys that a mask leaves; None: no mask


CASES = (
    Case("self", 4096, 4096),
    Case("cross", 4096, 512),
    Case("causal", 4096, 4096, causal=True),
    Case("padded", 4096, 512, seen=100),
    Case("mini, self", 80, 80, 64, 4),
    Case("mini, cross", 80, 512, 64, 4),
)


@dataclass
class Row:
    """One comparison; seconds, and products of two numbers and their sums (two operations) a second."""

    case: str
    dtype: str
    path: str
    threads: int
    heads: int
    rounds: int
    ours: float
    ours_min: float
    theirs: float
    theirs_min: float
    ratio: float
    ratio_min: float
    rate: float
    linear_rate: float
    error: float
    error_of_torch: float


def measure(case: Case, dtype: str, heads: int, rounds: int) -> Row:
    heads = case.heads or heads
    q, k, v = (torch.randn(1, n, heads, case.width).to(DTYPES[dtype]) for n in (case.queries, case.keys, case.keys))
    mask = None if case.seen is None else (torch.arange(case.keys) < case.seen)[None, None, None]
    scale = case.width**-0.5
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    side = min(2048, case.queries)
    a, b = (torch.randn(side, side).to(DTYPES[dtype]) for _ in range(2))

    def ours() -> Tensor:
        return torch.ops.mxdit.attention(q, k, v, mask, scale, case.causal, "exact")

    def theirs() -> Tensor:
        return scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=case.causal)

    timed = thread_seconds if torch.get_num_threads() == 1 else timer(torch.device("cpu"))
    mine, others, products = alternate([[ours], [theirs], [lambda: linear(a, b)]], rounds, timed)
    pairs = case.queries * (case.queries + 1) // 2 if case.causal else case.queries * (case.seen or case.keys)
    want, at = exactly(*(x[0, 0].double() for x in heads_first), mask, case.causal)
    error, of_torch = (
        (got[0, at, 0].double() - want).square().mean().sqrt().item() for got in (ours(), theirs().transpose(1, 2))
    )
    ratio, ratio_min = statistics.median(others) / statistics.median(mine), min(others) / min(mine)
    return Row(
        case.name, dtype, native.selected(), torch.get_num_threads(), heads, rounds, statistics.median(mine), min(mine),
        statistics.median(others), min(others), ratio, ratio_min, 4 * pairs * case.width * heads / min(mine),
        2 * side**3 / min(products), error, of_torch,
    )  # fmt: skip


def thread_seconds(call: Call) -> float:
    """What one thread took of a core, whatever other programs took."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def exactly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of sampled queries in float64, and which they are."""
    at = torch.linspace(0, len(q) - 1, min(SAMPLE, len(q))).long()
    seen = (
        at[:, None] >= torch.arange(len(k)) if causal else torch.ones(1, len(k)).bool() if mask is None else mask[0, 0]
    )
    return (q[at] @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(1) @ v, at


def table(rows: list[Row]) -> str:
    head = (
        "case", "dtype", "path, threads", "heads", "mxdit (min)", "torch (min)", "ratio", "of minima",
        "of a linear's rate", "error", "of torch's",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for row in rows:
        mine, other = (
            f"{milliseconds(value)} ({milliseconds(least)}) ms"
            for value, least in ((row.ours, row.ours_min), (row.theirs, row.theirs_min))
        )
        lines.append((
            row.case, row.dtype, f"{row.path}, {row.threads}", str(row.heads), mine, other, f"{row.ratio:.2f}",
            f"{row.ratio_min:.2f}", f"{row.rate / row.linear_rate:.2f}", f"{row.error:.2e}",
            f"{row.error / row.error_of_torch:.3f}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=None, help="only those whose name begins so (default: all)")
    parser.add_argument("--path", choices=native.paths(), help="of mxdit, and torch held to it (default: the best)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--heads", type=int, default=4, help="of the large cases (default: 4)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and mxdit alike (default: 2)")
    parser.add_argument("--rounds", type=int, default=9, help="of the large cases; small ones have 40 times as many")
    parser.add_argument("--json", type=Path, help="write the numbers and the machine there as well")
    args = parser.parse_args()
    if native.selected() == native.REFERENCE:
        parser.error(f"nothing to measure: {native.why_not()}")
    held = HELD.get(args.path, {})
    if any(os.environ.get(name) != value for name, value in held.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | held)
    if args.path:
        native.select(args.path)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about = machine(args.threads) | {"held": held}
    print(caption(about, False), end="\n\n", flush=True)
    rows = [
        measure(case, dtype, args.heads, args.rounds * (40 if case.name.startswith("mini") else 1))
        for case in CASES
        if not args.case or case.name.startswith(tuple(args.case))
        for dtype in args.dtype
    ]
    print(table(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"machine": about, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
