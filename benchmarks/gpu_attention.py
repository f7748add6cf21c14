"""Attention by each of mxdit's methods beside torch's scaled_dot_product_attention: errors and times.

Small cases of every kind (dtypes, widths, masks, causal, shared heads), then Wan2.2-A14B's: 40 heads of 128, its own tokens or
512 of text as keys. Errors are roots of mean squares against float64, as shares of the result's size: over the first and the
last head, all queries of a small case and 64 of a large one. A method is right where its error is at most twice the larger one
of its reference's on the CPU and torch's; "same" is the share of outputs that are the reference's bits. In each round every call
is made once; ratios are of medians, torch's over the method's.

    python benchmarks/gpu_attention.py [--device cuda] [--method exact] [--quick] [--rounds 10] [--json FILE]

    --method  one of them, beside torch
    --quick   the small cases only

Prints a line a call, and writes the file anew after each case. Exits with 1 when a method is wrong.
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
from torch.nn.functional import scaled_dot_product_attention

from mxdit.bench.record import report
from mxdit.bench.timing import Times, alternate, timer
from mxdit.ops.attention import METHODS

SMALL = (  # dtype, queries, keys, heads of q, of k, their width, mask, causal
    (torch.bfloat16, 300, 331, 4, 4, 128, None, False),
    (torch.bfloat16, 300, 331, 4, 2, 64, None, True),
    (torch.bfloat16, 300, 331, 2, 2, 256, None, False),
    (torch.float16, 300, 331, 2, 2, 128, "bools", False),
    (torch.float16, 300, 331, 2, 1, 40, "floats", False),
    (torch.float32, 300, 331, 2, 2, 80, "floats", False),
)
LARGE = tuple(
    (torch.bfloat16, *size, 40, 40, 128, None, False) for size in ((4096, 4096), (32760, 512), (32760, 32760))
)


@torch.inference_mode()
def measure(device: str, methods: Sequence[str], quick: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for torch and for each of these methods on each case."""
    place = torch.device(device)
    for dtype, queries, keys, heads, sources, width, kind, causal in SMALL if quick else SMALL + LARGE:
        torch.manual_seed(0)
        sizes = ((queries, heads), (keys, sources), (keys, sources))
        q, k, v = (torch.randn(1, *size, width, device=place).to(dtype) for size in sizes)
        mask = None
        if kind == "bools":
            mask = (torch.rand(1, 1, 1, keys) < 0.7).to(place)
        elif kind == "floats":
            mask = torch.randn(1, heads, queries, keys).to(place, dtype)
        first = [x.transpose(1, 2) for x in (q, k, v)]
        calls = {
            "torch": partial(scaled_dot_product_attention, *first, mask, is_causal=causal, enable_gqa=heads > sources)
        }
        for method in methods:
            calls[method] = partial(torch.ops.mxdit.attention, q, k, v, mask, width**-0.5, causal, method)
        rows = torch.arange(queries) if queries < 512 else torch.linspace(0, queries - 1, 64).long()
        here = {name: call() for name, call in calls.items()}
        here["torch"] = here["torch"].transpose(1, 2)
        square, errors, same = 0.0, dict.fromkeys([*here, *(f"{method}, reference" for method in methods)], 0.0), {}
        for head in (0, heads - 1):
            operands = (q[0, rows.to(place), head].cpu(), *(x[0, :, head // (heads // sources)].cpu() for x in (k, v)))
            own = None if mask is None else mask.expand(1, heads, queries, keys)[0, head].cpu()
            true = in_float64(*operands, own, causal)
            square += float(true.pow(2).mean())
            got = {name: out[0, rows.to(place), head].cpu() for name, out in here.items()}
            for method in methods:
                expected = got[f"{method}, reference"] = METHODS[method](*operands, own, width**-0.5, causal).to(dtype)
                same[method] = min(same.get(method, 1.0), float((got[method] == expected).double().mean()))
            for name, out in got.items():
                errors[name] += float((out.double() - true).pow(2).mean())
        errors = {name: (error / square) ** 0.5 for name, error in errors.items()}
        seconds = alternate([[call] for call in calls.values()], rounds, timer(place))
        times = {name: Times.of(taken) for name, taken in zip(calls, seconds, strict=True)}
        size = {"queries": queries, "keys": keys, "heads": heads, "sources": sources, "width": width}
        for name, taken in times.items():
            row = {"dtype": str(dtype), **size, "mask": kind, "causal": causal, "method": name, "error": errors[name]}
            row |= {"times": asdict(taken), "ratio": times["torch"].median / taken.median}
            if name in methods:
                row |= {"reference_error": (reference := errors[f"{name}, reference"]), "same": same[name]}
                row["right"] = errors[name] <= 2 * max(errors["torch"], reference)
            yield row


def in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    logits = q.double() @ k.double().T * q.shape[1] ** -0.5
    if causal:
        mask = torch.ones(logits.shape, dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask.double()
    return logits.softmax(1) @ v.double()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    methods = [args.method] if args.method else list(METHODS)
    for row in measure(args.device, methods, args.quick, args.rounds):
        rows.append(row)
        if args.json:
            settings = {"quick": args.quick, "rounds": args.rounds}
            args.json.write_text(json.dumps(report("attention", args.device, settings, rows), indent=1) + "\n")
        kind = f"{row['dtype'][6:]} {row['queries']} x {row['keys']} x {row['heads']} x {row['width']}"
        kind += f" {row['mask'] or 'causal' if row['mask'] or row['causal'] else ''}"
        figures = f"{row['times']['median'] * 1e3:.3f} ms, x {row['ratio']:.2f}, error {row['error']:.2e}"
        print(f"{kind}: {row['method']}: {figures}{'' if row.get('right', True) else ' WRONG'}", flush=True)
    return 0 if all(row.get("right", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
