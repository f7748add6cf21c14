"""Other weights to round: what makes up for the rounding of activations beforehand, on average.

Both lower a layer's error on inputs like those that they were fitted to. Neither is part of the default: see docs/calibrating.md
for what they did to clips.
"""

from __future__ import annotations

import torch
from torch import Tensor


def regression_target(weight: Tensor, hessian: Tensor, cross: Tensor, lam: float) -> Tensor:
    """W' = W + W C (H + lam mean(diag H) I)^-1, which makes Xq W'^T the nearest to X W^T in least squares.

    Args:
        weight: (N, K) fp32.
        hessian: (K, K) fp32, Xq^T Xq / T of quantized inputs.
        cross: (K, K) fp32, C = (X - Xq)^T Xq / T.
        lam: how far it is held to W: more rows of X need less.
    """
    ridge = hessian.clone()
    diagonal = hessian.diagonal()
    ridge.diagonal().add_(torch.where(diagonal > 0, lam * diagonal.mean(), 1.0))
    return weight + torch.linalg.solve(ridge, (weight @ cross).mT).mT


def corrected_bias(bias: Tensor | None, exact: Tensor, given: Tensor) -> Tensor:
    """The bias plus the mean difference of a layer's exact outputs (T, N) and those that it gives, in the bias's dtype."""
    shift = (exact.float() - given.float()).mean(0)
    return shift.to(exact.dtype) if bias is None else (bias.float() + shift).to(bias.dtype)
