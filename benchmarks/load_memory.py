"""Whether loading a Wan transformer stays within its limit of memory: BF16, quantized online, and reloaded offline.

Makes a WanTransformer3DModel with the layer shapes of Wan2.2-A14B (d=5120, f=13824; 4 of its 40 blocks) in sharded BF16,
or in FP32 as Wan2.2 is published, loads it in a fresh process per mode, and samples RssAnon (memory of the process that no
file backs) while it loads. The limit is the quantized model plus its largest single tensor plus 10 %. Pages of a mapped
file do not count: the system can drop them; the peak of total RSS, which has them, is shown beside.

    python benchmarks/load_memory.py [--blocks 4] [--dim 5120] [--ffn 13824] [--shard 1000000000] [--source float32]
                                     [--methods mxfp4 ...] [--json FILE] [--keep DIR]

Exits with 1 when a mode is over its limit. What a whole pipeline takes, `mxdit bench memory` says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mxdit.bench.memory import load_transformer
from mxdit.bench.processes import TIDY, alone
from mxdit.bench.shapes import A14B
from mxdit.bench.standins import make_checkpoint
from mxdit.bench.variants import variants

METHODS = ("mxfp4", "mxfp4_dualscale", "mxfp8")
MIB = 2**20
SLACK = 1.10
COLUMNS = ("mode", "baseline", "peak", "RSS peak", "held", "model", "largest tensor", "limit", "seconds", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dim", type=int, default=5120, help="inner dimension, a multiple of 128")
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--shard", type=int, default=10**9, help="bytes of the largest file")
    parser.add_argument("--source", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of the checkpoint")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--keep", type=Path, help="make the checkpoints there, in an empty directory, and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(args.keep or Path(scratch), args)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def run(root: Path, args: argparse.Namespace) -> list[dict]:
    """One row of numbers per mode, each measured in its own process."""
    shape, source = replace(A14B, dim=args.dim, ffn=args.ffn, heads=args.dim // 128), root / args.source
    make_checkpoint(source, shape, args.blocks, dtype=getattr(torch, args.source), shard=args.shard)
    rows = []
    for variant in variants(source, False, args.methods, root, lambda _: None):
        row = asdict(alone(load_transformer, variant, environment=TIDY))
        limit = int((row["model"] + row["largest"]) * SLACK)
        rows.append({**row, "limit": limit, "ok": row["peak"] <= limit})
    return rows


def table(rows: list[dict]) -> str:
    """The rows in MiB; `peak` and `held` are over the baseline."""
    keys = ("baseline", "peak", "rss", "held", "model", "largest", "limit")
    cells = [COLUMNS]
    for row in rows:
        numbers = [f"{row[key] / MIB:.0f}" for key in keys]
        cells.append((row["mode"], *numbers, f"{row['seconds']:.1f}", "ok" if row["ok"] else "over"))
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


if __name__ == "__main__":
    sys.exit(main())
