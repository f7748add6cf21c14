"""Stand-ins of Wan2.2's shapes with random weights: a block, and a checkpoint of a few blocks, for models that do not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mxdit.bench.shapes import TEXT_TOKENS, Wan
from mxdit.checkpoint.writer import STEM, Part, index_of, new_directory, shards_of
from mxdit.layers import MXLinear
from mxdit.numerics.formats import TensorInfo
from mxdit.quantize.apply import swap

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

STD = 0.02  # of weights
SIDE = 32  # patches in height and width of the frames that a block's tokens are


def skeleton(wan: Wan, blocks: int | None = None) -> WanTransformer3DModel:
    """The transformer on the meta device, with as many blocks as it has or fewer."""
    from diffusers import WanTransformer3DModel

    config: dict[str, Any] = wan.config | ({} if blocks is None else {"num_layers": blocks})
    with torch.device("meta"):
        return WanTransformer3DModel(**config)


def make_checkpoint(
    directory: Path, wan: Wan, blocks: int, *, dtype: torch.dtype = torch.bfloat16, shard: int = 2 << 30
) -> None:
    """Write a transformer's checkpoint in ``dtype``, one tensor at a time, in files of at most ``shard`` bytes.

    Its weights are random enough that every code occurs, and the same on every machine.
    """
    model = skeleton(wan, blocks)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # One stretch of noise, from another place for every tensor: much cheaper than noise for each.
    largest = max(torch.Size(shape).numel() for shape in wanted.values())
    noise = torch.empty(largest + 4096, dtype=dtype).normal_(std=STD, generator=torch.Generator().manual_seed(0))

    def values(index: int, shape: tuple[int, ...]) -> Tensor:
        return noise[index % 4096 :][: torch.Size(shape).numel()].view(shape)

    parts = {
        name: Part(TensorInfo(shape, dtype), lambda i=index, s=shape: values(i, s))
        for index, (name, shape) in enumerate(wanted.items())
    }
    shards = shards_of(parts, shard)
    with new_directory(directory, "benchmark") as staging:
        for file in shards:
            staging.write_shard(file.name, file)
        if len(shards) > 1:
            staging.write_json(f"{STEM}.safetensors.index.json", index_of(shards))
        staging.write_json("config.json", {"_class_name": "WanTransformer3DModel", **model.config})


def random_block(wan: Wan, device: str = "cpu") -> nn.Module:
    """One block in BF16."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.device("meta"):
        empty = WanTransformerBlock(wan.dim, wan.ffn, wan.heads, cross_attn_norm=True).eval()
    block = empty.bfloat16().to_empty(device=device)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.fill_("weight" in name)
            else:
                parameter.normal_(std=STD)
    return block


def block_inputs(wan: Wan, tokens: int, device: str = "cpu") -> tuple[Any, ...]:
    """What a block is called with: (1, tokens, d) and 512 tokens of text in BF16, modulation in FP32, and the rotary
    embedding of the first tokens of a clip whose frames are 32 x 32 patches."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    frames = -(-tokens // SIDE**2)
    rope = WanRotaryPosEmbed(wan.dim // wan.heads, (1, 2, 2), 1024)
    rotary = rope(torch.empty(1, wan.channels, frames, 2 * SIDE, 2 * SIDE, device="meta"))
    x, text = (torch.randn(1, count, wan.dim).bfloat16().to(device) for count in (tokens, TEXT_TOKENS))
    modulation = (torch.randn(1, 6, wan.dim) * 0.1).to(device)
    return x, text, modulation, tuple(part[:, :tokens].to(device) for part in rotary)


def quantized(block: nn.Module, method: str, activation: str) -> nn.Module:
    """The block with its linears quantized; it shares the other parameters with the original."""
    other = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for path, linear in block.named_modules():
        if isinstance(linear, nn.Linear):
            layer = MXLinear.from_weight(linear.weight, linear.bias, method=method, activation=activation)
            swap(other, path, layer)
    return other
