"""Triton kernels that encode, decode and fold: docs/numerics.md sections 1 to 3, a tile of rows and 512 of K at a time.

Nothing here may be reordered, fused or approximated by a compiler: rounding is done on bit patterns and by additions of
fp32 numbers, quotients are `tl.div_rn`, and kernels are launched without fusion (`LAUNCH`).

Importing this file imports Triton. Under TRITON_INTERPRET=1 the kernels run on CPU tensors, which is how the tests prove them.
"""

# Kernels are in Triton's language, whose types are not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdit.numerics.formats import BlockFormat

LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
GROUP = 512  # of K, in one program: what an outer scale covers
ROWS = 4  # in one program
PADDED = 128  # of K: folded rows are filled up with zeros to a multiple
WINDOW = 3  # binades between a row's blocks that int8 has room for: 2 * 6 << 3 is 96
LOWEST, HIGHEST = 66, 180  # scale bytes whose products and sums are all normal fp32 numbers
_FIELD = tl.constexpr(0xFF)
_SIXTH = tl.constexpr(0.1666666716337204)  # 0x3E2AAAAB
_UOS = tl.constexpr(0.13793103396892548)  # 0x3E0D3DCB, 1 / 7.25
_CUBLAS = tl.constexpr(0.002232142956927419)  # 0x3B124925, 1 / 448
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no room for fractions
_GROUP = tl.constexpr(GROUP)
_WINDOW = tl.constexpr(WINDOW)
_LOWEST, _HIGHEST = tl.constexpr(LOWEST), tl.constexpr(HIGHEST)


# -- bits --------------------------------------------------------------------------------------------------------------


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def power(field):
    """The fp32 power of two with this exponent field, 1 to 254."""
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """fp32 of any float: of bf16 by its bits."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to any float, rounded to nearest even: to bf16 by its bits."""
    if dtype == tl.bfloat16:
        pattern = bits(x)
        rounded = pattern + 0x7FFF + ((pattern >> 16) & 1)
        rounded = tl.where(x != x, pattern | 0x00400000, rounded)  # a NaN stays one whatever its payload
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def cut(x):
    """fp32 to bf16 of what has at most 8 significant bits, so that nothing is rounded: all decoded values, but E4M3's under the
    three lowest scales."""
    return (bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """fp32 rounded to a value of ``dtype``, in fp32."""
    return widen(narrow(x, dtype))


# -- encoding ----------------------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(byte, empty, not_finite):
    """Scale bytes, 0xFF where not finite, and 2**(127 - byte): 0 for empty blocks, NaN where not finite."""
    factor = tl.where(empty, 0.0, power(254 - byte))
    return tl.where(not_finite, 0xFF, byte), tl.where(not_finite, float("nan"), factor)


@triton.jit
def _single_scale(top, rule: tl.constexpr, emax: tl.constexpr, dtype: tl.constexpr):
    """Bytes and reciprocals of blocks whose largest magnitude has the pattern ``top``; sections 2.2, 2.4 and 2.5."""
    field = top >> 23
    not_finite = field == _FIELD
    if rule == "uos" or rule == "cublas":
        scaled = bits(top.to(tl.float32, bitcast=True) * (_UOS if rule == "uos" else _CUBLAS))
        byte = scaled >> 23
        mantissa = scaled & 0x7FFFFF
        bump = (mantissa > 0) & (byte > 0)
        if rule == "cublas":
            bump = bump | ((byte == 0) & (mantissa > 0x400000))
        byte += bump.to(tl.int32)
        empty = top == 0
    else:
        if rule != "ocp":  # as a bf16 pattern: fp16 rounds to it, fp32 is cut to it
            short = top
            if dtype == tl.float16:
                short = top + 0x7FFF + ((top >> 16) & 1)
            carried = ((short >> 16) + (0x3F if rule == "even6" else 0x1F)) >> 7
            field = tl.where((short >> 23) < 2, 0, carried)
        byte = tl.maximum(field - emax, 0)
        empty = byte == 0
    return _reciprocal(byte, empty, not_finite)


@triton.jit
def _codes(v, element: tl.constexpr, mode: tl.constexpr, dtype: tl.constexpr):
    """Codes, int32, of scaled fp32 values; section 1. NaN becomes +0, out of range saturates, zeros keep their sign."""
    mantissa: tl.constexpr = 1 if element == "e2m1" else 3
    first: tl.constexpr = 127 if element == "e2m1" else 121  # field of the lowest normal binade
    most: tl.constexpr = 6.0 if element == "e2m1" else 448.0
    sign_bit: tl.constexpr = 8 if element == "e2m1" else 128
    if mode == "floor":  # a bf16 product that underflows is -0, where fp32 would still floor to -0.5
        v = nearest(v, tl.bfloat16) if dtype == tl.bfloat16 else v
    v = tl.where(v != v, 0.0, v)
    v = tl.where(v > most, most, tl.where(v < -most, -most, v))
    field = tl.maximum((bits(v) >> 23) & _FIELD, first)
    sign = (bits(v) >> 31) & sign_bit
    v = v * power(254 + mantissa - field)  # in units of the binade's quantum
    if mode == "rint":
        v = (tl.abs(v) + _RINT) - _RINT
    elif mode == "round":
        v = tl.floor((tl.floor(tl.abs(v) * 2.0) + 1.0) * 0.5)  # ties away from zero, each step exact
    else:
        v = tl.abs(tl.floor(v))
    return (v.to(tl.int32) + ((field - first) << mantissa)) | sign


@triton.jit
def _encode(
    x_ptr, mul_ptr, codes_ptr, scale_ptr, outer_ptr, m, k, stride,
    element: tl.constexpr, rule: tl.constexpr, mode: tl.constexpr, dual: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """x (m, k), rows ``stride`` apart, times mul_ptr's multipliers, if any, to codes and scales; outer ones where ``dual``."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    emax: tl.constexpr = 2 if element == "e2m1" else 8
    blocks: tl.constexpr = _GROUP // 32
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    at = row.to(tl.int64)[:, None]
    column = tl.program_id(1) * _GROUP + tl.arange(0, _GROUP)
    inside = (row[:, None] < m) & (column[None, :] < k)
    v = widen(tl.load(x_ptr + at * stride + column[None, :], mask=inside, other=0.0))
    if mul_ptr is not None:
        mul = widen(tl.load(mul_ptr + column, mask=column < k, other=0.0))
        v = nearest(v * mul[None, :], dtype)
    if dual:
        magnitude = bits(v) & 0x7FFFFFFF
        finite = tl.max(tl.where(magnitude >= 0x7F800000, 0, magnitude), axis=1)
        l0 = finite.to(tl.float32, bitcast=True) * _SIXTH
        l0 = tl.where(bits(l0) < 0x00800000, 0.0, l0)
        tl.store(outer_ptr + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), l0, mask=row < m)
        flushed = l0 == 0.0  # the quotients are +-inf then, but for zeros
        v = nearest(tl.div_rn(v, tl.broadcast_to(tl.where(flushed, 1.0, l0)[:, None], (rows, _GROUP))), dtype)
        v = tl.reshape(v, (rows, blocks, 32))
        top = tl.max(bits(v) & 0x7FFFFFFF, axis=2)
        top = tl.where(flushed[:, None] & (top > 0), 0x7F800000, top)
        field = top >> 23
        byte, factor = _reciprocal(tl.maximum(field - emax, 0), field == 0, field == _FIELD)
    else:
        v = tl.reshape(v, (rows, blocks, 32))
        top = tl.max(bits(v) & 0x7FFFFFFF, axis=2)
        byte, factor = _single_scale(top, rule, emax, dtype)
    found = _codes(v * factor[:, :, None], element, mode, dtype)
    block = tl.program_id(1) * blocks + tl.arange(0, blocks)
    count = tl.cdiv(k, 32)
    tl.store(
        scale_ptr + at * count + block[None, :], byte.to(tl.uint8), mask=(row[:, None] < m) & (block[None, :] < count)
    )
    if element == "e2m1":
        low, high = tl.split(tl.reshape(found, (rows, _GROUP // 2, 2)))
        pair = tl.program_id(1) * (_GROUP // 2) + tl.arange(0, _GROUP // 2)
        inside = (row[:, None] < m) & (pair[None, :] < k // 2)
        tl.store(codes_ptr + at * (k // 2) + pair[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)
    else:
        tl.store(codes_ptr + at * k + column[None, :], tl.reshape(found, (rows, _GROUP)).to(tl.uint8), mask=inside)


def encode(
    x: Tensor,
    mul: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    row: BlockFormat,
    rule: str,
    mode: str,
) -> None:
    """Fill codes, scale and outer from x (M, K), whose rows are contiguous.

    Args:
        mul: (K,) multipliers in x's dtype, or None.
        outer: (M, ceil(K/512)) fp32, where the format has outer scales.
    """
    m, k = x.shape
    _encode[(triton.cdiv(m, ROWS), triton.cdiv(k, GROUP))](
        x, mul, codes, scale, outer, m, k, x.stride(0), row.element.name, rule, mode, outer is not None, ROWS, **LAUNCH
    )  # fmt: skip


# -- decoding ----------------------------------------------------------------------------------------------------------


@triton.jit
def values(code, element: tl.constexpr):
    """fp32 of codes, one each: exact."""
    if element == "e2m1":
        field = code & 7
        # 1 is 0.5, the only subnormal; from 2 on, exponent and mantissa are those of fp32, 126 binades lower.
        large = ((field + 252) << 22).to(tl.float32, bitcast=True)
        value = tl.where(field > 1, large, field.to(tl.float32) * 0.5)
        return tl.where((code & 8) != 0, -value, value)
    field = code & 127
    large = ((field + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(field > 7, large, field.to(tl.float32) * 0.001953125)
    value = tl.where(field == 127, float("nan"), value)
    return tl.where((code & 128) != 0, -value, value)


@triton.jit
def factors(byte):
    """fp32 of scale bytes: 2**(byte - 127), NaN for 0xFF."""
    pattern = tl.where(byte == 0, 0x00400000, tl.where(byte == _FIELD, 0x7FC00000, byte << 23))
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def load_codes(ptr, at, column, inside_rows, k, rows: tl.constexpr, width: tl.constexpr, element: tl.constexpr):
    """(rows, width) codes, int32, of rows that start at ``at`` codes, from ``column`` on; 0 outside.

    Args:
        at: (rows, 1) int64.
        column: a multiple of ``width``.
        inside_rows: (rows, 1), which rows there are.
    """
    if element == "e2m1":
        pair = column // 2 + tl.arange(0, width // 2)
        both = tl.load(ptr + at // 2 + pair[None, :], mask=inside_rows & (pair[None, :] < k // 2), other=0).to(tl.int32)
        return tl.reshape(tl.join(both & 15, both >> 4), (rows, width))
    columns = column + tl.arange(0, width)
    return tl.load(ptr + at + columns[None, :], mask=inside_rows & (columns[None, :] < k), other=0).to(tl.int32)


@triton.jit
def load_scales(ptr, at, column, inside_rows, k, width: tl.constexpr):
    """(rows, width / 32) scale bytes of rows that are ``at`` (rows, 1) int64, from ``column`` on; 127, which is 1, outside."""
    count = tl.cdiv(k, 32)
    block = column // 32 + tl.arange(0, width // 32)
    return tl.load(ptr + at * count + block[None, :], mask=inside_rows & (block[None, :] < count), other=127)


@triton.jit
def load_values(
    codes_ptr, scale_ptr, row, column, m, k, rows: tl.constexpr, width: tl.constexpr, element: tl.constexpr
):
    """(rows, width) fp32, decoded without an outer scale; 0 outside of (m, k)."""
    at = row.to(tl.int64)[:, None]
    inside = row[:, None] < m
    v = values(load_codes(codes_ptr, at * k, column, inside, k, rows, width, element), element)
    factor = factors(load_scales(scale_ptr, at, column, inside, k, width).to(tl.int32))
    return tl.reshape(tl.reshape(v, (rows, width // 32, 32)) * factor[:, :, None], (rows, width))


@triton.jit
def load_packed(codes_ptr, scale_ptr, row, column, m, k, width: tl.constexpr):
    """(rows, width / 2) bytes of E2M1 codes and their (rows, width / 32) scale bytes, as `tl.dot_scaled` takes them."""
    at = row.to(tl.int64)[:, None]
    inside = row[:, None] < m
    pair = column // 2 + tl.arange(0, width // 2)
    codes = tl.load(codes_ptr + at * (k // 2) + pair[None, :], mask=inside & (pair[None, :] < k // 2), other=0)
    return codes, load_scales(scale_ptr, at, column, inside, k, width)


@triton.jit
def _decode(codes_ptr, scale_ptr, outer_ptr, out_ptr, m, k, element: tl.constexpr, rows: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * _GROUP
    v = load_values(codes_ptr, scale_ptr, row, column, m, k, rows, _GROUP, element)
    at = row.to(tl.int64)
    if outer_ptr is not None:
        v = v * tl.load(outer_ptr + at * tl.num_programs(1) + tl.program_id(1), mask=row < m, other=0.0)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    columns = column + tl.arange(0, _GROUP)
    inside = (row[:, None] < m) & (columns[None, :] < k)
    tl.store(out_ptr + at[:, None] * k + columns[None, :], narrow(v, dtype), mask=inside)


def decode(codes: Tensor, scale: Tensor, outer: Tensor | None, out: Tensor, row: BlockFormat) -> None:
    """Fill out (M, K), in any float dtype, from contiguous codes and scales."""
    m, k = out.shape
    _decode[(triton.cdiv(m, ROWS), triton.cdiv(k, GROUP))](
        codes, scale, outer, out, m, k, row.element.name, ROWS, **LAUNCH
    )


# -- folding -----------------------------------------------------------------------------------------------------------


@triton.jit
def _fold(codes_ptr, scale_ptr, out_ptr, base_ptr, m, k, stride, rows: tl.constexpr):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * _GROUP
    at = row.to(tl.int64)[:, None]
    inside = row[:, None] < m
    code = load_codes(codes_ptr, at * k, column, inside, k, rows, _GROUP, "e2m1")
    doubled = (values(code, "e2m1") * 2.0).to(tl.int32)
    doubled = tl.reshape(doubled, (rows, _GROUP // 32, 32))
    byte = load_scales(scale_ptr, at, column, inside, k, _GROUP).to(tl.int32)
    live = (tl.max(tl.abs(doubled), axis=2) > 0) | (byte == _FIELD)
    high = tl.max(tl.where(live, byte, -1), axis=1)
    low = tl.min(tl.where(live, byte, 512), axis=1)
    fits = (high - low <= _WINDOW) & (low >= _LOWEST) & (high <= _HIGHEST)
    base = tl.where(high < 0, 127, tl.where(fits, low, 0))  # nothing but zeros fits under any
    shift = tl.where(live & fits[:, None], byte - low[:, None], 0)
    folded = tl.reshape(doubled << shift[:, :, None], (rows, _GROUP))
    columns = column + tl.arange(0, _GROUP)
    tl.store(out_ptr + at * stride + columns[None, :], folded.to(tl.int8), mask=inside & (columns[None, :] < stride))
    tl.store(base_ptr + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), base.to(tl.uint8), mask=row < m)


def fold(codes: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """E2M1 codes (M, K/2) and scales (M, ceil(K/32)) as integers with one scale per 512.

    Two E2M1 values whose scales are at most `WINDOW` binades apart are small integers times the same power of two, and the
    tensor cores add products of integers without rounding.

    Returns:
        int8 (M, K to a multiple of `PADDED`) and uint8 (M, ceil(K/512)), a base b where the values are int8 * 2**(b - 128), and
        0 where a row's group does not fit: its integers mean nothing.
    """
    m, groups = len(codes), triton.cdiv(k, GROUP)
    out = torch.empty((m, -(-k // PADDED) * PADDED), dtype=torch.int8, device=codes.device)
    base = torch.empty((m, groups), dtype=torch.uint8, device=codes.device)
    _fold[(triton.cdiv(m, ROWS), groups)](codes, scale, out, base, m, k, out.stride(0), ROWS, **LAUNCH)
    return out, base
