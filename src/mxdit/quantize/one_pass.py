"""A LoRA's product added to a quantized linear's while it is multiplied, as a variant of peft's LoRA.

peft scales that product and adds it in passes of their own over the output, which cost more than the adapter's multiplications:
see docs/adapters.md. peft calls the methods of a `LoraVariant` prone to change; tests hold its oldest and newest release to them.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from mxdit.errors import ModelError
from mxdit.weights import NOT_FUSED


class OnePass(LoraVariant):
    """``result + (x @ A.T) @ B.T * scaling``, rounded once."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the adapter is there before the variant is."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """x (..., K) and result (..., N) of one dtype. Without gradients, and where nobody looks at the base layer's output, the
        sum takes the place of `result`."""
        up, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        down = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if torch.is_grad_enabled() or result.dtype is not down.dtype:
            return result + up(down) * scaling
        held = result if not module.get_base_layer()._forward_hooks else result.clone()
        rows = held.view(-1, held.shape[-1])
        rows.addmm_(down.reshape(-1, down.shape[-1]), up.weight.t(), alpha=scaling)
        if up.bias is not None:
            rows.add_(up.bias, alpha=scaling)
        return held

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: the weight is packed."""
        raise ModelError("an adapter cannot be fused into a packed weight", where=active_adapter, hint=NOT_FUSED)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Refused as well."""
        OnePass.merge_safe(module, active_adapter, orig_weight)

    unmerge = merge_safe
