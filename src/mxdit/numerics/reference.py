"""Reference matmuls: torch.matmul on exactly decoded fp32 values, on every device.

What is computed (docs/numerics.md section 4), with every accumulator in fp32:

* single level: ``cast(bias + sum)``. The sum of products is exact in fp32, in whatever order, for all but extreme
  spreads of the scales within a row; then the result is bias + sum with one fp32 rounding, which is how "the bias is
  the first addend" reads without naming an order. Where the sum is not exact (E4M3 operands, mostly), its order is
  torch.matmul's.
* outer scales: per 512 of K, ascending, ``acc = fma(p, s, acc)`` from ``acc = bias``, with p the partial sum (exact
  for all but extreme spreads, again) and s the fp32 product of the two outer scales.

Operands are decoded in pieces, so that neither a weight nor its activations ever exist whole in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mxdit.numerics.codec import decode_blocks
from mxdit.numerics.formats import block_format

Rows = Callable[[slice], Tensor]
"""Gives the rows of an operand that a slice names, as fp32 (rows, K), without their outer scale."""

_GROUP = 512  # elements of K under one pair of outer scales
_ACTIVATION_PIECE = 1 << 24  # fp32 elements of activations decoded at once: 64 MB
_WEIGHT_PIECE = 1 << 22  # fp32 elements of weights decoded at once: 16 MB
_RESULT_PIECE = 1 << 23  # fp32 accumulators at once: 32 MB
_FMA_PIECE = 1 << 15  # elements that a CPU multiply-adds at once, so that its fp64 scratch stays in cache

# Where torch keeps the precision of fp32 matmuls.
_PRECISION: dict[str, Any] = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}


def packed_rows(codes: Tensor, scale: Tensor, fmt: str) -> Rows:
    """The rows of packed (rows, K) ``codes`` and their E8M0 ``scale``."""
    row = block_format(fmt)
    return lambda part: decode_blocks(codes[part], scale[part], row)


def float_rows(x: Tensor) -> Rows:
    """The rows of an (M, K) tensor that was never packed."""
    return lambda part: x[part].float()


def matmul(a: Rows, w: Rows, k: int, bias: Tensor | None, result: Tensor) -> Tensor:
    """Fill ``result`` (M, N) with ``cast(bias + a @ w.T)``.

    A bf16 or fp16 result saturates where fp32 exceeds its range (section 8, choice 5); a NaN stays.

    Args:
        a: rows of (M, K).
        w: rows of (N, K).
        k: K.
        bias: (N,) fp32 or None.
        result: (M, N), bf16, fp16 or fp32.
    """
    limit = torch.finfo(result.dtype).max
    with _ieee_fp32(result.device):
        for rows, left, columns, right in _pieces(a, w, k, result):
            acc = torch.matmul(left, right.T)
            if bias is not None:
                acc += bias[columns]
            if result.dtype is not torch.float32:
                acc.clamp_(-limit, limit)
            result[rows, columns] = acc
    return result


def matmul_groups(
    a: Rows, w: Rows, k: int, a_outer: Tensor | None, w_outer: Tensor, bias: Tensor | None, result: Tensor
) -> Tensor:
    """Fill ``result`` (M, N) with the product of operands that have an fp32 scale per 512 of K; section 4.3.

    Inf and NaN are kept (section 8, choice 8).

    Args:
        a: rows of (M, K).
        w: rows of (N, K).
        k: K.
        a_outer: (M, ceil(K/512)) fp32, or None where the activation has no outer scale: then it counts as 1.
        w_outer: (N, ceil(K/512)) fp32.
        bias: (N,) fp32 or None.
        result: (M, N), bf16, fp16 or fp32.
    """
    with _ieee_fp32(result.device):
        for rows, left, columns, right in _pieces(a, w, k, result):
            acc = left.new_zeros(left.shape[0], right.shape[0])
            if bias is not None:
                acc += bias[columns]
            for group in range(w_outer.shape[1]):
                span = slice(group * _GROUP, (group + 1) * _GROUP)
                scale = w_outer[columns, group].expand_as(acc)
                if a_outer is not None:
                    scale = a_outer[rows, group, None] * scale
                _accumulate(acc, torch.matmul(left[:, span], right[:, span].T), scale)
            result[rows, columns] = acc
    return result


def _accumulate(acc: Tensor, p: Tensor, s: Tensor) -> None:
    """``acc = fma(p, s, acc)`` in place, a few rows at a time."""
    step = max(1, _FMA_PIECE // acc.shape[1]) if acc.device.type == "cpu" else acc.shape[0]
    for first in range(0, acc.shape[0], step):
        piece = slice(first, first + step)
        acc[piece] = fma(p[piece], s[piece], acc[piece])


def fma(p: Tensor, s: Tensor, acc: Tensor) -> Tensor:
    """``p * s + acc`` of fp32 tensors of one shape, in fp32 with one rounding.

    The product is exact in fp64. Its sum with acc is not always, and rounding that sum first to fp64 and then to fp32
    can land on the wrong side of a tie. So the fp64 sum is rounded to odd: cut toward zero, its last bit set where
    anything was cut. Such a number is never a tie of the narrower format, and rounding it to fp32 rounds the true sum
    (Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums", 2008).
    """
    addend, product = acc.double(), p.double().mul_(s)
    total = addend + product
    # Knuth's TwoSum: what the addition lost, exactly.
    back = total - addend
    lost = product.sub_(back).add_(addend.sub_(back.neg_().add_(total)))
    lost *= total  # only its sign matters from here: negative where `total` was rounded away from zero
    bits = total.view(torch.int64)
    bits -= (lost < 0).long()
    bits |= (lost.abs_() > 0).long()  # false for the NaN that an infinite total leaves
    return total.float()


def _pieces(a: Rows, w: Rows, k: int, result: Tensor) -> Iterator[tuple[slice, Tensor, slice, Tensor]]:
    """Cut (M, N) into tiles whose fp32 operands are of bounded size."""
    m, n = result.shape
    n_step = min(n, max(1, _WEIGHT_PIECE // k))
    m_step = max(1, min(_ACTIVATION_PIECE // k, _RESULT_PIECE // max(1, n_step)))
    for i in range(0, m, m_step):
        rows = slice(i, min(i + m_step, m))
        left = a(rows)
        for j in range(0, n, n_step):
            columns = slice(j, min(j + n_step, n))
            yield rows, left, columns, w(columns)


@contextmanager
def _ieee_fp32(device: torch.device) -> Iterator[None]:
    """fp32 matmuls at full precision: no TF32, no bf16 passes, no autocast, whatever the program around has set.

    The setting is process-wide, so it is changed only where it differs and put back at once.
    """
    backend = _PRECISION.get(device.type)
    with torch.autocast(device.type, enabled=False):
        if backend is None or backend.matmul.fp32_precision == "ieee":
            yield
            return
        previous = backend.matmul.fp32_precision
        backend.matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            backend.matmul.fp32_precision = previous
