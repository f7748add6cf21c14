"""What `mxdit quantize` and `mxdit convert` cost in memory and time, for two sizes of a model.

Makes transformers with the layer shapes of Wan2.2-A14B (d=5120, f=13824) of 4 and of 12 blocks in sharded BF16, and runs each
command in a fresh process that samples its RssAnon (memory that no file backs). Beside each stands a plain copy of the same
bytes, files synced, in the same run. Rates are in bytes of the source. The conversions are of the last method.

    python benchmarks/convert_memory.py [--blocks 4 12] [--dim 5120] [--ffn 13824] [--shard 2147483648]
                                        [--methods mxfp4 ...] [--threads N] [--json FILE] [--scratch DIR]

Exits with 1 when a peak is above the shard size plus 1 GiB, or differs by more than 10 % between the sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mxdit.bench.shapes import A14B, Wan
from mxdit.bench.standins import make_checkpoint
from mxdit.generation.memory import Sampler, status

MIB = 2**20

METHODS = ("mxfp8", "mxfp4", "mxfp4_dualscale")
COLUMNS = (
    "command",
    "blocks",
    "GB read",
    "GB written",
    "seconds",
    "GB/s",
    "of a copy",
    "peak MiB",
    "over idle",
    "limit",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 12))
    parser.add_argument("--dim", type=int, default=5120, help="inner dimension, a multiple of 128")
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--shard", type=int, default=2 << 30, help="bytes of the largest file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument(
        "--scratch", type=Path, help="where the checkpoints are made and removed (default: the system's)"
    )
    parser.add_argument("--child", nargs=3, metavar=("COMMAND", "SRC", "DST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args)))
        return 0
    rows = []
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            rows += run(Path(scratch), blocks, args)
    print(table(rows, args.shard + (1 << 30)))
    steady = True
    for command in dict.fromkeys(row["command"] for row in rows[1:] if row["command"] != "copy"):
        small, large = (row["peak"] for row in rows if row["command"] == command)
        steady &= abs(large - small) <= 0.1 * max(large, small)
        print(f"{command}: the peak of {args.blocks[1]} blocks is {large / small:.3f} of {args.blocks[0]} blocks'")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if steady and all(row["peak"] <= args.shard + (1 << 30) for row in rows) else 1


def run(root: Path, blocks: int, args: argparse.Namespace) -> list[dict]:
    """Every command on one model, the copy first."""
    source = root / "bf16"
    make_checkpoint(source, shape(args), blocks, shard=args.shard)
    rows = [child("copy", source, root / "copy", blocks, args)]
    shutil.rmtree(root / "copy")
    for method in args.methods:
        rows.append(child(f"quantize {method}", source, root / method, blocks, args))
    packed = root / args.methods[-1]
    rows.append(child("convert vllm-omni", packed, root / "vllm-omni", blocks, args))
    rows.append(child("convert packed", root / "vllm-omni", root / "back", blocks, args))
    for row in rows:
        row["of_copy"] = row["rate"] / rows[0]["rate"]
    return rows


def shape(args: argparse.Namespace) -> Wan:
    """A14B's, in the width that was asked for."""
    return replace(A14B, dim=args.dim, ffn=args.ffn, heads=args.dim // 128)


def child(command: str, source: Path, destination: Path, blocks: int, args: argparse.Namespace) -> dict:
    options = ["--shard", str(args.shard), "--threads", str(args.threads)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", command, str(source), str(destination), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"command": command, "blocks": blocks, **json.loads(done.stdout.splitlines()[-1])}


def measure(command: str, source: str, destination: str, args: argparse.Namespace) -> dict:
    """Run one command in this process and say what it took, in bytes and seconds."""
    import torch
    from diffusers import WanTransformer3DModel

    from mxdit.checkpoint import convert_checkpoint, quantize_checkpoint

    torch.set_num_threads(args.threads)
    with torch.device("meta"):  # what imports take is not the command's
        WanTransformer3DModel(num_attention_heads=1, num_layers=1)
    verb, _, what = command.partition(" ")
    idle, started = status("RssAnon"), time.monotonic()
    with Sampler() as sampler:
        if verb == "copy":
            shutil.copytree(source, destination)
            for file in Path(destination).iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        elif verb == "quantize":
            quantize_checkpoint(Path(source), Path(destination), what, shard_size=args.shard).write()
        else:
            convert_checkpoint(Path(source), Path(destination), what, shard_size=args.shard).write()
    seconds = time.monotonic() - started
    read, written = (sum(f.stat().st_size for f in Path(d).iterdir()) for d in (source, destination))
    return {
        "read": read,
        "written": written,
        "seconds": seconds,
        "rate": read / seconds,
        "peak": sampler.anon,
        "over": sampler.anon - idle,
    }


def table(rows: list[dict], limit: int) -> str:
    """The rows, memory in MiB."""
    cells = [COLUMNS]
    for row in rows:
        cells.append(
            (
                row["command"],
                str(row["blocks"]),
                f"{row['read'] / 1e9:.2f}",
                f"{row['written'] / 1e9:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['rate'] / 1e9:.3f}",
                f"{row['of_copy']:.2f}",
                f"{row['peak'] / MIB:.0f}",
                f"{row['over'] / MIB:.0f}",
                f"{limit / MIB:.0f}",
            )
        )
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
