"""What loading a Wan transformer costs in memory: BF16, quantized online, and reloaded offline.

Makes a WanTransformer3DModel with the layer shapes of Wan2.2-A14B (d=5120, f=13824; 4 of its 40 blocks) in sharded BF16,
or in FP32 as Wan2.2 is published, loads it in a fresh process per mode, and samples RssAnon (memory of the process that no
file backs) while it loads. The limit is the quantized model plus its largest single tensor plus 10 %. Pages of a mapped
file do not count: the system can drop them; the peak of total RSS, which has them, is shown beside.

    python benchmarks/load_memory.py [--blocks 4] [--dim 5120] [--ffn 13824] [--shard 1GB] [--source float32]
                                     [--methods mxfp4 ...] [--json FILE] [--keep DIR]

Exits with 1 when a mode is over its limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

METHODS = ("mxfp4", "mxfp4_dualscale", "mxfp8")
MIB = 2**20
SLACK = 1.10
COLUMNS = ("mode", "baseline", "peak", "RSS peak", "held", "model", "largest tensor", "limit", "seconds", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--dim", type=int, default=5120, help="inner dimension, a multiple of 128")
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--shard", default="1GB", help="max_shard_size of the checkpoints")
    parser.add_argument("--source", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of the checkpoint")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--keep", type=Path, help="make the checkpoints there and keep them")
    parser.add_argument("--child", nargs=2, metavar=("DIR", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--save-to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, save_to=args.save_to, shard=args.shard)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(args.keep or Path(scratch), args)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def run(root: Path, args: argparse.Namespace) -> list[dict]:
    """One row of numbers per mode, each measured in its own process."""
    source = root / args.source
    if not (source / "config.json").exists():
        make(source, args)
    rows = [child(source, "none", args)]
    for method in args.methods:
        offline = root / method
        rows.append(child(source, method, args, save_to=offline))
        rows.append(child(offline, "offline", args))
        rows[-1]["mode"] = f"{method} offline"
    return rows


def make(directory: Path, args: argparse.Namespace) -> None:
    """Write the float checkpoint; random enough that every code occurs, and the same on every machine."""
    import torch
    from diffusers import WanTransformer3DModel

    dtype = getattr(torch, args.source)
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=args.dim // 128, attention_head_dim=128, ffn_dim=args.ffn, num_layers=args.blocks
        )
    # One stretch of noise, from another place for every tensor: much cheaper than noise for each.
    largest = max(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(largest + 4096, dtype=dtype).normal_(std=0.02, generator=generator)
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        path, _, leaf = name.rpartition(".")
        values = noise[index % 4096 :][: parameter.numel()].reshape(parameter.shape).clone()
        setattr(model.get_submodule(path), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.save_pretrained(directory, max_shard_size=args.shard)


def child(source: Path, method: str, args: argparse.Namespace, save_to: Path | None = None) -> dict:
    command = [sys.executable, __file__, "--child", str(source), method, "--shard", args.shard]
    if save_to:
        command += ["--save-to", str(save_to)]
    # glibc keeps freed blocks of up to 32 MB for later, or not, as they happen to lie; tensors shall go back when they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: str, method: str, save_to: str | None, shard: str) -> dict:
    """Load `directory` in this process ("none" and "offline" without a config) and say what that took, in bytes."""
    import diffusers
    import torch
    from safetensors import safe_open

    import mxdit

    diffusers.utils.logging.disable_progress_bar()
    config = None if method in ("none", "offline") else mxdit.MXConfig(method)

    def load(source: str) -> diffusers.WanTransformer3DModel:
        return diffusers.WanTransformer3DModel.from_pretrained(
            source, torch_dtype=torch.bfloat16, quantization_config=config
        )

    # A small load first: what imports, thread pools and allocators take once in a process is not the model's.
    with tempfile.TemporaryDirectory() as scratch:
        small = diffusers.WanTransformer3DModel(num_attention_heads=1, ffn_dim=1024, num_layers=1).bfloat16()
        if method == "offline":
            mxdit.quantize_(small, "mxfp4_dualscale")
        small.save_pretrained(scratch)
        load(scratch)
    del small
    gc.collect()
    before, started = status("RssAnon"), time.monotonic()
    with Sampler() as sampler:
        model = load(directory)
    seconds = time.monotonic() - started
    tensors = model.state_dict().values()
    size, largest = sum(t.nbytes for t in tensors), 0
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            largest = max([largest, *(stored.get_tensor(name).nbytes for name in sorted(stored.keys()))])
    limit = int((size + largest) * SLACK)
    peak = sampler.anon - before
    row = {
        "mode": {"none": "bf16"}.get(method, f"{method} online"),
        "baseline": before,
        "peak": peak,
        "rss": sampler.rss,
        "held": status("RssAnon") - before,
        "model": size,
        "largest": largest,
        "limit": limit,
        "seconds": round(seconds, 1),
        "ok": peak <= limit,
    }
    if save_to:
        model.save_pretrained(save_to, max_shard_size=shard)
    return row


class Sampler:
    """The largest RssAnon and RSS of this process, seen every millisecond from a thread."""

    def __init__(self) -> None:
        self.anon = self.rss = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.anon, self.rss = max(self.anon, status("RssAnon")), max(self.rss, status("VmRSS"))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


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
