"""LoRA merged into a checkpoint's float tensors, each while it passes.

Here a LoRA is plain: module paths of ours, two matrices and a number each. integrations/lora_files.py makes that of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.checkpoint.component import Component
from mxdit.checkpoint.writer import Part
from mxdit.numerics.formats import TensorInfo
from mxdit.quantize.loras import LEAVES, check_layers

MERGED = "_merged_lora"  # in config.json; diffusers keeps what begins with an underscore, and builds no model of it


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one linear's weight: scaling * (up @ down); and to its bias: scaling * bias.

    down     (rank, in_features), float.
    up       (out_features, rank), float.
    scaling  of the file itself, as alpha / rank, where that is not in the matrices.
    bias     (out_features,), float, or None.
    """

    down: Part
    up: Part
    scaling: float = 1.0
    bias: Part | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA for one transformer.

    file    that it is of, and the SHA-256 of that.
    layers  path of a linear -> what is added to it.
    """

    file: Path
    sha256: str
    layers: Mapping[str, LoraLayer]


def check_fits(lora: Lora, model: nn.Module) -> None:
    """Raise CheckpointError unless each layer is of a linear of `model`, a skeleton perhaps, and has its shape."""
    layers = {
        path: {
            leaf: part.info for leaf, part in zip(LEAVES, (of.down, of.up, of.bias), strict=True) if part is not None
        }
        for path, of in lora.layers.items()
    }
    check_layers(layers, model, str(lora.file))


def merged(component: Component, loras: Sequence[tuple[Lora, float]]) -> Component:
    """The component with LoRAs in its weights, each times its scale, in this order; what they change becomes FP32.

    The sum is made in FP32 when a tensor is read, as peft makes it of a model in FP32: weight + (up @ down) * scaling, one LoRA
    after the other. No more than one weight and its sum are held. config.json says what was merged.

    Raises CheckpointError for a LoRA that does not fit.
    """
    for lora, _ in loras:
        check_fits(lora, component.skeleton)
    parts = dict(component.parts)
    for name, deltas in _by_tensor(loras).items():
        part = parts[name]
        parts[name] = Part(TensorInfo(part.info.shape, torch.float32), partial(_sum, part, deltas))
    noted = [{"file": lora.file.name, "sha256": lora.sha256, "scale": scale} for lora, scale in loras]
    return replace(
        component, parts=parts, config={**component.config, MERGED: [*merged_into(component.config), *noted]}
    )


def merged_into(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a config.json says was merged into its tensors: file, sha256 and scale of each, the first merged first."""
    noted = config.get(MERGED)
    return [dict(entry) for entry in noted if isinstance(entry, Mapping)] if isinstance(noted, list) else []


def _by_tensor(loras: Sequence[tuple[Lora, float]]) -> dict[str, list[tuple[Part, Part | None, float]]]:
    """Name of a tensor -> what is added to it: (up, down, factor) for a weight, (bias, None, factor) for a bias."""
    found: dict[str, list[tuple[Part, Part | None, float]]] = {}
    for name, delta in (entry for lora, scale in loras for entry in _deltas(lora, scale)):
        found.setdefault(name, []).append(delta)
    return found


def _deltas(lora: Lora, scale: float) -> Iterator[tuple[str, tuple[Part, Part | None, float]]]:
    for path, layer in lora.layers.items():
        yield f"{path}.weight", (layer.up, layer.down, layer.scaling * scale)
        if layer.bias is not None:
            yield f"{path}.bias", (layer.bias, None, layer.scaling * scale)


def _sum(part: Part, deltas: Sequence[tuple[Part, Part | None, float]]) -> Tensor:
    total = part.read().to(torch.float32, copy=True)
    for left, right, factor in deltas:
        delta = left.read().float()
        total += (delta if right is None else delta @ right.read().float()) * factor
    return total
