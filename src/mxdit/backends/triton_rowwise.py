"""Triton kernels between linears and attention: RMS norm with rotary embedding, GELU; docs/numerics.md section 11, bit for bit.

Nothing is fused or approximated: quotients are `tl.div_rn`, the root is `tl.sqrt_rn`, rounding to whole numbers is an addition.
Rounding to 16 bits is the device's own conversion, to nearest even: by bits it would be a quarter of all instructions.
Both work in place: what a program writes, no other reads, and it reads a number before it writes there.
"""

# Kernels are in Triton's language, whose types are not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mxdit.backends.triton_codec import bits, widen
from mxdit.numerics import rowwise

# One warp, and 32 programs at most on a multiprocessor: of the rows that are read for their sum the cache holds all until they
# are read again, to be written.
NORM: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
GELU: dict[str, Any] = {"size": 1024, "num_warps": 4, "enable_fp_fusion": False}
SIZE = 1024  # numbers of a program at once, of one row or of several short ones
_AHEAD = tl.constexpr(16)  # pieces whose loads do not wait for each other
_LANES = tl.constexpr(rowwise.LANES)
_LOG2_E, _LN2_HIGH, _LN2_LOW = map(tl.constexpr, (rowwise.LOG2_E, rowwise.LN2_HIGH, rowwise.LN2_LOW))
_C6, _C5, _C4, _C3, _C2, _C1, _C0 = map(tl.constexpr, rowwise.EXP)
_SQRT_2_OVER_PI, _CUBE = tl.constexpr(rowwise.SQRT_2_OVER_PI), tl.constexpr(rowwise.CUBE)
_SATURATED = tl.constexpr(rowwise.SATURATED)
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no room for fractions


# -- RMS norm ------------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_rms(at, inside, width, eps, rows: tl.constexpr):
    """(rows, 1) of the rows that start at ``at``."""
    lane = tl.arange(0, _LANES)
    sums = tl.zeros((rows, _LANES), tl.float32)
    for first in range(0, width, _LANES * _AHEAD):
        for piece in tl.static_range(_AHEAD):
            column = first + piece * _LANES + lane
            mask = inside[:, None] & (column < width)[None, :]
            x = widen(tl.load(at[:, None] + column[None, :], mask=mask, other=0.0))
            sums += x * x
    for step in tl.static_range(5):  # an axis of two is summed by one addition, whatever its order
        sums = tl.sum(tl.reshape(sums, (rows, 2, _LANES >> (step + 1))), 1)
    mean = tl.div_rn(sums, tl.full(sums.shape, 0.0, tl.float32) + width) + eps
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean))


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, count, width, x_stride, out_stride, eps, tokens, token_rows,
    head: tl.constexpr, rounded: tl.constexpr, rows: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """``count`` rows, of which ``token_rows`` after each other are of one token, with cos and sin (tokens, head)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    within = row < count
    at, to = x_ptr + row * x_stride, out_ptr + row * out_stride
    factor = _inverse_rms(at, within, width, eps, rows)
    for first in range(0, width, step):
        column = first + tl.arange(0, step)
        inside = within[:, None] & (column < width)[None, :]
        v = widen(tl.load(at[:, None] + column[None, :], mask=inside, other=0.0)) * factor
        if rounded:
            v = widen(v.to(dtype))
        if weight_ptr is not None:
            v = v * widen(tl.load(weight_ptr + column, mask=column < width, other=0.0))[None, :]
        if cos_ptr is not None:
            angle = (row // token_rows % tokens)[:, None] * head + (column % head)[None, :]
            cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
            cos, _ = tl.split(tl.reshape(cos, (rows, step // 2, 2)))
            _, sin = tl.split(tl.reshape(sin, (rows, step // 2, 2)))
            a, b = tl.split(tl.reshape(widen(v.to(dtype)), (rows, step // 2, 2)))
            v = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (rows, step))
        tl.store(to[:, None] + column[None, :], v.to(dtype), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool,
    tokens: int, token_rows: int, out: Tensor,
) -> None:  # fmt: skip
    """Fill out (M, K), which may be x, with the op ``rms_norm`` of x (M, K), both with their rows' numbers side by side.

    Args:
        weight, cos, sin: contiguous, or None.
        tokens: how many there are; a row's token is the row // token_rows % tokens.
    """
    count, width = x.shape
    rows = max(1, SIZE // max(rowwise.LANES, triton.next_power_of_2(width)))
    _rms_norm[(triton.cdiv(count, rows),)](
        x, weight, cos, sin, out, count, width, x.stride(0), out.stride(0), eps, tokens, token_rows,
        width if cos is None else cos.shape[1], rounded, rows, SIZE // rows, **NORM,
    )  # fmt: skip


# -- GELU ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    """e^x of fp32 numbers of magnitude 20 at most."""
    shifted = x * _LOG2_E + _RINT
    n = shifted - _RINT
    s = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = tl.full(s.shape, _C6, tl.float32)
    p = p * s + _C5
    p = p * s + _C4
    p = p * s + _C3
    p = p * s + _C2
    p = p * s + _C1
    p = p * s + _C0
    return p * ((bits(shifted) << 23) + (127 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _gelu(x_ptr, count, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    wide = widen(x)
    inner = _SQRT_2_OVER_PI * (wide + _CUBE * ((wide * wide) * wide))
    twice = inner + inner
    twice = tl.where(twice > _SATURATED, _SATURATED, tl.where(twice < -_SATURATED, -_SATURATED, twice))
    e = _exp(twice)
    tanh = tl.div_rn(e + e, e + 1.0) - 1.0
    tl.store(x_ptr + at, ((0.5 * wide) * (1.0 + tanh)).to(x.dtype), mask=at < count)


def gelu_(x: Tensor) -> None:
    """The op ``gelu_`` of contiguous x."""
    _gelu[(triton.cdiv(x.numel(), GELU["size"]),)](x, x.numel(), **GELU)
