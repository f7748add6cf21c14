"""The ops ``rms_norm``, ``rms_norm_`` and ``gelu_``: what lies between linears and attention, by `mxdit.numerics.rowwise`.

A function that is named like an op is its reference; ``prepare_`` checks an op's arguments and makes room for its result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics import rowwise

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> Tensor:
    """x over the root mean square of its last axis, times weight, then turned by a rotary embedding.

    Args:
        x: (..., K) of bf16, fp16 or fp32; with cos and sin (B, L, ..., K), L being tokens.
        weight: (K) of one of these dtypes, or None for ones.
        eps: what is added to the mean of squares.
        cos, sin: (L, D) of fp32, or None for no rotary embedding. D is even and divides K. Of each D numbers the pair
            (2i, 2i + 1) is turned by cos[:, 2i] and sin[:, 2i + 1], which is how diffusers' Wan stores them.
        rounded: whether the norm is rounded to x's dtype before the weight, as diffusers' own RMSNorm does.

    Returns:
        What x is, contiguous.
    """
    result = prepare_rms_norm(x, weight, eps, cos, sin, rounded)
    if not x.numel():
        return result
    out = rowwise.rms_norm(x, weight, eps, rounded)
    return result.copy_(out if cos is None or sin is None else rowwise.rotate(out, cos, sin))


def rms_norm_(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> None:
    """`rms_norm` in place."""
    x.copy_(rms_norm(x, weight, eps, cos, sin, rounded))


def gelu_(x: Tensor) -> None:
    """GELU in the approximation by tanh of x, of bf16, fp16 or fp32, in place."""
    prepare_gelu_(x)
    x.copy_(rowwise.gelu(x))


def prepare_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> Tensor:
    """Check the arguments of `rms_norm`, and make room for what it returns."""
    prepare_rms_norm_(x, weight, eps, cos, sin, rounded)
    return x.new_empty(x.shape)


def prepare_rms_norm_(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> None:
    """Check the arguments of `rms_norm_`."""
    where = "mxdit::rms_norm"
    _check_dtype(x, where)
    if not x.dim() or not x.shape[-1]:
        raise FormatError("no axis to norm over", where=where, got=tuple(x.shape), expected="(..., K), K at least 1")
    if not math.isfinite(eps) or eps < 0:
        raise FormatError("no such eps", where=where, got=eps, expected="a number from 0")
    if weight is not None and (weight.dtype not in _DTYPES or weight.shape != x.shape[-1:]):
        raise FormatError(
            "a weight that does not fit",
            where=where,
            got=f"{tuple(weight.shape)} of {weight.dtype}",
            expected=f"{tuple(x.shape[-1:])} of {' or '.join(map(str, _DTYPES))}",
        )
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise FormatError("one of cos and sin alone", where=where, expected="both or neither")
    fits = x.dim() > 2 and cos.dim() == 2 and cos.shape[0] == x.shape[1] and cos.shape == sin.shape
    width = cos.shape[-1] if fits else 0
    if not fits or not width or width % 2 or x.shape[-1] % width or {cos.dtype, sin.dtype} != {torch.float32}:
        raise FormatError(
            "a rotary embedding that does not fit",
            where=where,
            got=f"cos {tuple(cos.shape)} of {cos.dtype}, sin {tuple(sin.shape)} of {sin.dtype}, x {tuple(x.shape)}",
            expected="x (B, L, ..., K); cos and sin (L, D) of torch.float32, D even and a divisor of K",
        )


def own_rows(x: Tensor) -> Tensor:
    """x as (rows, K), each row's numbers side by side, to be written: x's memory, or else a copy, to be copied back. That raises
    torch's error where rows share memory, of which each would be normed again."""
    rows = x.reshape(-1, x.shape[-1])
    shared = len(rows) > 1 and rows.stride(0) < rows.shape[1]
    return rows.clone(memory_format=torch.contiguous_format) if shared or rows.stride(1) != 1 else rows


def prepare_gelu_(x: Tensor) -> None:
    """Check the argument of `gelu_`."""
    _check_dtype(x, "mxdit::gelu_")


def _check_dtype(x: Tensor, where: str) -> None:
    if x.dtype not in _DTYPES:
        raise FormatError("no such dtype", where=where, got=x.dtype, expected=" or ".join(map(str, _DTYPES)))
