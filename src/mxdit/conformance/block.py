"""A block of Wan2.2 as diffusers builds it, small: every kind of linear that it has, with real activations between them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.conformance.calls import ByReference, Call, quantizing
from mxdit.conformance.case import SKIPPED, Result, Tally, generator
from mxdit.conformance.compare import Finding, compare_values
from mxdit.errors import BackendError, MXDiTError
from mxdit.layers import MXLinear
from mxdit.numerics.formats import block_format
from mxdit.quantize.apply import swap

DIM, HEADS, FFN = 128, 2, 576  # the FFN's second linear has one group of 512 and a part of another
TOKENS, TEXT = 40, 7


@dataclass(frozen=True)
class BlockCase:
    """The block, quantized on the device and run there, beside the same by the reference.

    Its linears are held to what linears are held to, one by one, on the activations that they really meet: quantizing the
    weight, and the product. The output as a whole can be no closer than torch's own operations are on the device.

    Attributes:
        method, activation: as of `mxdit.MXLinear`.
    """

    method: str
    activation: str

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"Wan block {self.method}, {self.activation} activations"

    def run(self, device: str = "cpu") -> Result:
        """Run it there, and by the reference."""
        try:
            block, inputs = _block(), _inputs(generator(self.name))
        except (ImportError, RuntimeError) as error:  # diffusers makes RuntimeErrors of what its imports raise
            return Result(self.name, SKIPPED, f"diffusers is not installed, or does not load: {error}")
        tally = Tally(device)
        kind = "w4a4 block" if self.activation == "mxfp4" else "block"
        with ByReference():
            expected = _forward(self._quantized(block), inputs)
        met: list[tuple[str, Tensor]] = []
        try:
            ours = self._quantized(copy.deepcopy(block).to(device))
            for path, layer in _linears(ours):
                layer.register_forward_pre_hook(lambda _, args, path=path: met.append((path, args[0].cpu())))
            got = _forward(ours, [tensor.to(device) for tensor in inputs]).cpu()
        except BackendError as error:
            tally.refusals.append(str(error))
        except (RuntimeError, MXDiTError) as error:
            tally.add(kind, Finding(message=f"{type(error).__name__}: {error}"))
        else:
            tally.add(kind, compare_values(got, expected, lambda: math.inf))
            before, after = dict(_linears(block)), dict(_linears(ours))
            for path, x in met:
                layer, weight = after[path], before[path].weight
                tally.check(quantizing(weight, block_format(layer.method), layer.rule, "rint"))
                tally.check(Call.of_layer(layer, x))
        return tally.result(self.name)

    def _quantized(self, block: nn.Module) -> nn.Module:
        """A copy of the block with every linear quantized where it is."""
        block = copy.deepcopy(block)
        for path, linear in _linears(block):
            layer = MXLinear.from_weight(linear.weight, linear.bias, method=self.method, activation=self.activation)
            swap(block, path, layer)
        return block


def _linears(block: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in block.named_modules() if isinstance(module, nn.Linear)]


def _block() -> nn.Module:
    """The block in bf16, the same in every process."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformerBlock(DIM, FFN, HEADS, cross_attn_norm=True).to(torch.bfloat16).eval()


def _inputs(g: torch.Generator) -> list[Tensor]:
    """Hidden states, text, modulation, and the cosines and sines of the tokens' positions."""
    hidden, text = (torch.randn(1, tokens, DIM, generator=g).to(torch.bfloat16) for tokens in (TOKENS, TEXT))
    width = DIM // HEADS
    angles = torch.arange(TOKENS)[:, None] * torch.exp(-9.0 * torch.arange(width // 2) / (width // 2))
    angles = angles.repeat_interleave(2, -1).view(1, TOKENS, 1, width)
    return [hidden, text, 0.5 * torch.randn(1, 6, DIM, generator=g), angles.cos(), angles.sin()]


def _forward(block: nn.Module, inputs: list[Tensor]) -> Tensor:
    hidden, text, modulation, cos, sin = inputs
    with torch.no_grad():
        return block(hidden, text, modulation, (cos, sin))
