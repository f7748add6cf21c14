"""Quantized directories for the engine, and what their linears give by our definition."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

import mxdit
import tiny
from mxdit.checkpoint import convert_checkpoint, quantize_checkpoint
from mxdit.config import MXConfig
from mxdit.models.families.wan import WAN
from mxdit.weights import quantize_weight

EXPERTS = ("transformer", "transformer_2")


def write(
    source: Path,
    directory: Path,
    configs: Mapping[str, Mapping[str, Any] | None],
    *,
    smooth: bool = False,
    numeric: bool = False,
) -> Path:
    """A quantized copy of a BF16 pipeline.

    Args:
        configs: expert -> keys of its config; None keeps it in BF16.
        smooth: whether linears get a `mul_scale`, which their weights are divided by.
        numeric: whether it is in the layout of the engine's own converter, not in ours.
    """
    packed = directory if not numeric else directory.with_name(f"{directory.name}-packed")
    first = next(config for config in configs.values() if config is not None)
    quantize_checkpoint(source, packed, MXConfig.from_dict(first), configs).write()
    if smooth:
        for expert in EXPERTS:
            config = configs[expert]
            if config is not None:
                _smooth(source / expert, packed / expert, MXConfig.from_dict(config))
    if numeric:
        convert_checkpoint(packed, directory, "vllm-omni").write()
    return directory


def _smooth(source: Path, folder: Path, config: MXConfig) -> None:
    weights, held = load_file(source / tiny.WEIGHTS), load_file(folder / tiny.WEIGHTS)
    paths = [name.removesuffix(".weight_scale") for name in held if name.endswith(".weight_scale")]
    groups = [group for group in WAN.sharing(paths) if group]
    alone = [[path] for path in paths if not any(path in group for group in groups)]
    for index, group in enumerate([*groups, *alone]):
        generator = torch.Generator().manual_seed(index)
        factors = (
            torch.empty(weights[f"{group[0]}.weight"].shape[1]).uniform_(0.5, 2, generator=generator).bfloat16().float()
        )
        for path in group:
            weight = (weights[f"{path}.weight"].float() / factors).bfloat16()
            method = method_of(config, path)
            parts = quantize_weight(weight, method, rule=config.rule_of(method), mul_scale=factors)
            held.update({f"{path}.{name}": part for name, part in parts.items()})
    save_file(held, folder / tiny.WEIGHTS, {"format": "pt"})


def method_of(config: MXConfig, path: str) -> str:
    """The method of a linear whose path a packed config lists where it is an exception."""
    return next((method for method, paths in config.layer_methods.items() if path in paths), str(config.quant_method))


class Definition:
    """What the linears of one expert give, from a packed directory: `mxdit.MXLinear`, and `mxdit.shard` for several ranks."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / tiny.WEIGHTS)
        self.config = _config(folder)
        names: dict[str, list[str]] = {}
        for tensor in self.tensors:
            path, _, leaf = tensor.rpartition(".")
            if leaf == "weight":
                names.setdefault(WAN.runtime_name(path, "vllm-omni"), []).append(path)
        # The engine fuses q, k and v in this order, whatever that of the files.
        self.paths = {name: sorted(paths, key=lambda path: "qkv".find(path[-1])) for name, paths in names.items()}

    def quantized(self, name: str) -> bool:
        return all(f"{path}.weight_scale" in self.tensors for path in self.paths[name])

    def parts(self, path: str) -> dict[str, Tensor]:
        found = {name: self.tensors.get(f"{path}.{name}") for name in mxdit.numerics.formats.PARTS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def held(self, name: str, kind: str, rank: int, degree: int) -> tuple[dict[str, Tensor], int]:
        """The tensors that a rank of a layer holds, and the zeros in front of its input."""
        parallel = "row" if kind == "RowParallelLinear" else "column"
        shards = [
            mxdit.shard(self.parts(path), method_of(self.config, path), parallel, rank, degree)
            for path in self.paths[name]
        ]
        parts = {
            key: shards[0][0][key] if key == "mul_scale" else torch.cat([parts[key] for parts, _ in shards])
            for key in shards[0][0]
        }
        return parts, shards[0][1].phase

    def partial(self, name: str, kind: str, rank: int, degree: int, x: Tensor, activation: str | None = None) -> Tensor:
        """What a rank's method returns for its input x, before the ranks' results are summed."""
        parts, phase = self.held(name, kind, rank, degree)
        method = method_of(self.config, self.paths[name][0])
        rows = parts["weight"].shape[0]
        layer = mxdit.MXLinear(
            x.shape[-1] + phase,
            rows,
            bias=False,
            method=method,
            activation=activation or self.config.activation_of(method),
            rule=self.config.rule_of(method),
            smooth="mul_scale" in parts,
        )
        layer.load(parts)
        if kind != "RowParallelLinear" or rank == 0:
            biases = [self.tensors[f"{path}.bias"] for path in self.paths[name]]
            own = [bias.chunk(degree)[rank] if kind != "RowParallelLinear" else bias for bias in biases]
            layer.bias = torch.nn.Parameter(torch.cat(own), requires_grad=False)
        with torch.no_grad():
            return layer(pad(x, (phase, 0)))


@cache
def _config(folder: Path) -> MXConfig:
    import json

    return MXConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])
