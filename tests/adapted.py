"""LoRAs for the tiny models, as tensors and as files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from mxdit.layers import MXLinear, linears_of

LINEARS = ("attn1.to_q", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")


def lora(
    model: nn.Module, rank: int = 4, *, seed: int = 0, linears: Iterable[str] = LINEARS, prefix: str = "transformer."
) -> dict[str, Tensor]:
    """A LoRA for some linears of every block and for ``proj_out``, by diffusers' names, in float32; one that is seen."""
    generator, found = torch.Generator().manual_seed(seed), dict(linears_of(model))
    paths = [f"blocks.{block}.{path}" for block in range(tiny.BLOCKS) for path in linears] + ["proj_out"]
    shapes = {
        f"{prefix}{path}.{part}.weight": shape
        for path in paths
        for part, shape in (("lora_A", (rank, found[path].in_features)), ("lora_B", (found[path].out_features, rank)))
    }
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def smoothed(model: nn.Module, method: str) -> None:
    """Put layers with multipliers in the place of a quantized model's."""
    for path, layer in list(linears_of(model)):
        if isinstance(layer, MXLinear):
            generator = torch.Generator().manual_seed(len(path))
            weight = torch.randn(layer.out_features, layer.in_features, generator=generator).bfloat16() / 16
            scale = torch.rand(layer.in_features, generator=generator) + 0.5
            new = MXLinear.from_weight(weight, layer.bias, method=method, mul_scale=scale)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


class Untouched:
    """What a model is: its modules, the bits of its tensors, what it computes. `check` says that it is so again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = {path: (id(module), type(module)) for path, module in model.named_modules()}
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.output = tiny.forward(model)
        self.adapters = sorted(getattr(model, "peft_config", {}))
        self.wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def check(self, trained: bool = True) -> None:
        model = self.model
        assert {path: (id(module), type(module)) for path, module in model.named_modules()} == self.modules
        state = model.state_dict()
        assert list(state) == list(self.state)
        for name, tensor in state.items():
            assert tensor.dtype == self.state[name].dtype and torch.equal(tensor, self.state[name]), name
        assert torch.equal(tiny.forward(model), self.output)
        assert sorted(getattr(model, "peft_config", None) or {}) == self.adapters
        if trained:
            assert {name: p.requires_grad for name, p in model.named_parameters()} == self.wanted
