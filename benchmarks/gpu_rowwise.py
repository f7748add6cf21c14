"""What lies between linears and attention, by mxdit's ops beside torch's: whether it is right, and times.

RMS norms (of all of a token's heads at once, and of each), the same with Wan's rotary embedding, and GELU: small cases in every
dtype, then Wan2.2-A14B's at 4,096 and 32,760 tokens. A result is right where it is the reference's bits on the CPU: all of a
small one, the first and last 16 tokens of a large one. Torch's are `rms_norm`, followed by a rotary embedding in plain torch
where there is one, and `gelu`. In each round both are called once, ours in place; ratios are of medians, torch's over ours;
bytes a second are those of one read and one write.

    python benchmarks/gpu_rowwise.py [--device cuda] [--quick] [--rounds 10] [--json FILE]

    --quick   the small cases only

Prints a line a case, and writes the file anew after it. Exits with 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mxdit.bench.record import report
from mxdit.bench.timing import Times, alternate, timer
from mxdit.numerics.rowwise import rotate
from mxdit.ops import rowwise

NORM, BY_HEAD, TURNED, GELU = "rms_norm", "rms_norm of heads", "rms_norm, rotary", "gelu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALL = [(method, dtype, 50, 6, 96) for method in (NORM, BY_HEAD, TURNED, GELU) for dtype in DTYPES]
LARGE = [  # the method, its dtype, tokens, heads, their width; GELU takes all of them as one
    *((method, torch.bfloat16, tokens, 40, 128) for tokens in (4096, 32760) for method in (NORM, BY_HEAD, TURNED)),
    *((GELU, torch.bfloat16, tokens, 108, 128) for tokens in (4096, 32760)),
]
EPS = 1e-6
ENDS = 16  # tokens at each end of a large case


@torch.inference_mode()
def measure(device: str, quick: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    place = torch.device(device)
    for method, dtype, tokens, heads, width in SMALL if quick else SMALL + LARGE:
        torch.manual_seed(0)
        shape = (1, tokens, heads, width) if method == BY_HEAD else (1, tokens, heads * width)
        x = torch.randn(shape, device=place).to(dtype)
        weight = torch.randn(shape[-1]).to(place, dtype)
        turn = tuple(torch.randn(2, tokens, width).to(place)) if method == TURNED else (None, None)
        ends = torch.arange(tokens)[[*range(ENDS), *range(-ENDS, 0)]] if tokens > 512 else torch.arange(tokens)
        some = [None if part is None else part[ends.to(place)].cpu() for part in turn]
        args = (x[:, ends.to(place)].cpu(), weight.cpu(), EPS, *some, False)
        if method == GELU:
            rowwise.gelu_(args[0])
            want = args[0]
        else:
            want = rowwise.rms_norm(*args)
        got = x.clone()
        ours = partial(in_place, method, weight, turn)
        ours(got)
        right = torch.equal(got[:, ends.to(place)].cpu(), want)
        calls = {"torch": partial(torchs, method, x, weight, turn), "mxdit": partial(ours, got)}
        seconds = alternate([[call] for call in calls.values()], rounds, timer(place))
        by_torch, by_ours = (Times.of(taken) for taken in seconds)
        yield {
            "method": method,
            "dtype": str(dtype),
            "tokens": tokens,
            "heads": heads,
            "width": width,
            "times": asdict(by_ours),
            "torch": asdict(by_torch),
            "ratio": by_torch.median / by_ours.median,
            "bytes_per_second": 2 * x.nbytes / by_ours.median,
            "right": right,
        }


def in_place(method: str, weight: Tensor, turn: tuple[Any, Any], x: Tensor) -> None:
    """In place of x."""
    if method == GELU:
        torch.ops.mxdit.gelu_(x)
    else:
        torch.ops.mxdit.rms_norm_(x, weight, EPS, *turn, False)


def torchs(method: str, x: Tensor, weight: Tensor, turn: tuple[Any, Any]) -> Tensor:
    if method == GELU:
        return F.gelu(x, approximate="tanh")
    out = F.rms_norm(x, x.shape[-1:], weight, EPS)
    return rotate(out, *turn) if method == TURNED else out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for row in measure(args.device, args.quick, args.rounds):
        rows.append(row)
        if args.json:
            settings = {"quick": args.quick, "rounds": args.rounds}
            args.json.write_text(json.dumps(report("rowwise", args.device, settings, rows), indent=1) + "\n")
        kind = f"{row['dtype'][6:]} {row['tokens']} x {row['heads']} x {row['width']}"
        figures = (
            f"{row['times']['median'] * 1e3:.3f} ms, {row['bytes_per_second'] / 1e9:.0f} GB/s, x {row['ratio']:.2f}"
        )
        print(f"{kind}: {row['method']}: {figures}{'' if row['right'] else ' WRONG'}", flush=True)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
