"""What a LoRA costs beside a quantized linear: time in percent of that linear, and memory of a whole expert.

The linear alone, and the same with an adapter of each rank, as peft adds it and as mxdit has it added, take turns, so that all
see the same machine; shares are of the fastest rounds, which other work on the machine disturbs least. bf16 activations and
adapters, one adapter, no gradient.

    python benchmarks/lora_linear.py [--rows 1024] [--ranks 32 64] [--rounds 15] [--device cuda] [--method mxfp4]

Memory is counted from shapes: an adapter beside all ten linears of every block of Wan2.2-A14B. Prints Markdown.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import mxdit
from mxdit.bench.shapes import A14B
from mxdit.bench.timing import alternate, timer
from mxdit.numerics.formats import block_format
from mxdit.quantize.one_pass import OnePass


def adapted(layer: mxdit.MXLinear, rank: int, one_pass: bool) -> nn.Module:
    """The layer with an adapter beside it."""
    holder = nn.ModuleDict({"linear": layer})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"], init_lora_weights=False)
    made: Any = inject_adapter_in_model(config, holder)["linear"].bfloat16()
    if one_pass:
        made.lora_variant["default"] = OnePass()
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="M: tokens of a call")
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--method", default="mxfp4")
    args = parser.parse_args()

    block = A14B.layers
    print(f"{args.method}, M = {args.rows}, {torch.get_num_threads()} threads, {args.device}\n")
    kinds = [(rank, one_pass) for rank in args.ranks for one_pass in (False, True)]
    names = [f"rank {rank}{'' if one_pass else ', peft alone'}" for rank, one_pass in kinds]
    print(f"| K x N | linear alone, ms | {' | '.join(names)} |")
    print("|---" * (2 + len(kinds)) + "|")
    for k, n in dict.fromkeys((layer.k, layer.n) for layer in block):
        weight = torch.randn(n, k, device=args.device, dtype=torch.bfloat16) / k**0.5
        linear = mxdit.MXLinear.from_weight(weight, torch.zeros(n).to(weight), method=args.method)
        del weight
        x = torch.randn(args.rows, k, device=args.device, dtype=torch.bfloat16)
        layers = [linear, *(adapted(linear, *kind) for kind in kinds)]
        rounds = alternate([[partial(layer, x)] for layer in layers], args.rounds, timer(args.device))
        alone, *others = (min(times) for times in rounds)
        shares = " | ".join(f"+{100 * (other / alone - 1):.1f} %" for other in others)
        print(f"| {k} x {n} | {1e3 * alone:.1f} | {shares} |", flush=True)

    parameters = sum(layer.count * (layer.k + layer.n) for layer in block) * A14B.blocks
    packed = sum(
        layer.count * info.nbytes
        for layer in block
        for info in block_format(args.method).tensors(layer.n, layer.k, smooth=False, where="benchmark").values()
    )
    print("\n| rank | MiB of an expert's adapter in BF16 | of the packed weights |\n|---|---|---|")
    for rank in args.ranks:
        size = 2 * rank * parameters
        print(f"| {rank} | {size / 2**20:.0f} | {100 * size / (packed * A14B.blocks):.1f} % |")


if __name__ == "__main__":
    main()
