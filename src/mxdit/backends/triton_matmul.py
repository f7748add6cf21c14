"""Triton kernels that multiply: docs/numerics.md sections 4 and 9. Activations (M, K) times weights (N, K).

Two of them, over one tiling:

* `_integers` multiplies what `mxdit.backends.triton_codec.fold` made of E2M1 operands on the int8 units, in int32, which
  rounds nothing; it leaves the tiles of rows that did not fit to the other.
* `_floats` decodes packed operands as it goes and multiplies any of them, in bf16 with fp32 accumulators. Sums of E2M1 products
  are exact in those, too, in whatever order (section 9). Tensor cores that take E2M1 as it is get it packed.

In both the sum over 512 of K goes to the accumulator in one piece: an addition where there is one level of scales, which is
exact, and an FMA where there are two.
"""

# Kernels are in Triton's language, whose types are not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdit.backends.triton_codec import GROUP, PADDED, cut, fold, load_packed, load_values, narrow, power, widen
from mxdit.numerics.codec import Packed

LAUNCH: dict[str, Any] = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
# ``step`` of K at once; for integers it divides PADDED.
INTEGERS: dict[str, Any] = {"tile_m": 128, "tile_n": 128, "step": PADDED, **LAUNCH}
FLOATS: dict[str, Any] = {"tile_m": 128, "tile_n": 128, "step": 64, **LAUNCH}  # its tiles divide those of INTEGERS
FOLDED = 1 << 27  # bytes of int8 activations at once: what a product needs beside its operands is bounded
_GROUP = tl.constexpr(GROUP)
_SWIZZLE = tl.constexpr(8)  # tiles of M that share a tile of N while it is in cache


@triton.jit
def _tile(m, n, tile_m: tl.constexpr, tile_n: tl.constexpr):
    """The first row and the first column of this program's tile."""
    across = tl.cdiv(n, tile_n)
    first = tl.program_id(0) // (_SWIZZLE * across) * _SWIZZLE
    height = tl.minimum(tl.cdiv(m, tile_m) - first, _SWIZZLE)
    within = tl.program_id(0) % (_SWIZZLE * across)
    return (first + within % height) * tile_m, within // height * tile_n


@triton.jit
def _all_fit(base_ptr, first, count, groups, rows: tl.constexpr, wide: tl.constexpr):
    """Whether every one of these rows could be folded, in every group."""
    row = first + tl.arange(0, rows)
    group = tl.arange(0, wide)
    inside = (row[:, None] < count) & (group[None, :] < groups)
    base = tl.load(base_ptr + row.to(tl.int64)[:, None] * groups + group[None, :], mask=inside, other=1).to(tl.int32)
    return tl.min(base) > 0


@triton.jit
def _start(bias_ptr, column, n, tile_m: tl.constexpr, tile_n: tl.constexpr, dual: tl.constexpr):
    """The accumulator: with two levels of scales the bias is its first addend."""
    if dual and bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + column, mask=column < n, other=0.0))
        return tl.broadcast_to(bias[None, :], (tile_m, tile_n))
    return tl.zeros((tile_m, tile_n), tl.float32)


@triton.jit
def _added(acc, part, a_outer_ptr, w_outer_ptr, row, column, group, groups, m, n):
    """The accumulator with a group's sum: added, or multiplied with the outer scales' product and added, with one rounding."""
    if w_outer_ptr is None:
        acc += part
    else:
        scale = tl.load(w_outer_ptr + column.to(tl.int64) * groups + group, mask=column < n, other=0.0)[None, :]
        if a_outer_ptr is not None:
            scale = tl.load(a_outer_ptr + row.to(tl.int64) * groups + group, mask=row < m, other=0.0)[:, None] * scale
        acc = tl.fma(part, tl.broadcast_to(scale, part.shape), acc)
    return acc  # the only return: Triton compiles what comes after one


@triton.jit
def _finish(acc, bias_ptr, out_ptr, row, column, m, n, limit, dual: tl.constexpr):
    """One level: add the bias, once, and saturate; both: round to the result's dtype."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if not dual:
        if bias_ptr is not None:
            acc += widen(tl.load(bias_ptr + column, mask=column < n, other=0.0))[None, :]
        if dtype != tl.float32:
            acc = tl.where(acc > limit, limit, tl.where(acc < -limit, -limit, acc))
    inside = (row[:, None] < m) & (column[None, :] < n)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * n + column[None, :], narrow(acc, dtype), mask=inside)


@triton.jit
def _integers(
    a_ptr, w_ptr, a_base_ptr, w_base_ptr, a_outer_ptr, w_outer_ptr, bias_ptr, out_ptr, m, n, width, groups, limit,
    tile_m: tl.constexpr, tile_n: tl.constexpr, step: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    dual: tl.constexpr = w_outer_ptr is not None
    top, left = _tile(m, n, tile_m, tile_n)
    row, column = top + tl.arange(0, tile_m), left + tl.arange(0, tile_n)
    if _all_fit(a_base_ptr, top, m, groups, tile_m, wide) & _all_fit(w_base_ptr, left, n, groups, tile_n, wide):
        acc = _start(bias_ptr, column, n, tile_m, tile_n, dual)
        k = tl.arange(0, step)
        rows = tl.minimum(row, m - 1).to(tl.int64)  # what lies outside is computed from the last row, and not written
        columns = tl.minimum(column, n - 1).to(tl.int64)
        a_at = a_ptr + rows[:, None] * width + k[None, :]
        w_at = w_ptr + columns[None, :] * width + k[:, None]
        for group in range(groups):
            total = tl.zeros((tile_m, tile_n), tl.int32)
            for first in range(group * _GROUP, tl.minimum(group * _GROUP + _GROUP, width), step):
                total = tl.dot(tl.load(a_at + first), tl.load(w_at + first), total, out_dtype=tl.int32)
            a_base = tl.load(a_base_ptr + rows * groups + group).to(tl.int32)
            w_base = tl.load(w_base_ptr + columns * groups + group).to(tl.int32)
            # |total| <= 96 * 96 * 512 < 2**23, and both powers and all products are normal numbers (LOWEST, HIGHEST): exact.
            part = total.to(tl.float32) * power(a_base - 1)[:, None] * power(w_base - 1)[None, :]
            acc = _added(acc, part, a_outer_ptr, w_outer_ptr, row, column, group, groups, m, n)
        _finish(acc, bias_ptr, out_ptr, row, column, m, n, limit, dual)


@triton.jit
def _floats(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, a_base_ptr, w_base_ptr, a_outer_ptr, w_outer_ptr, bias_ptr, out_ptr,
    m, n, k, groups, limit, a_element: tl.constexpr, w_element: tl.constexpr, operands: tl.constexpr,
    precision: tl.constexpr, fit_m: tl.constexpr, fit_n: tl.constexpr, tile_m: tl.constexpr, tile_n: tl.constexpr,
    step: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """``a_element`` None: a_ptr holds floats. ``operands``: the dtype in which they are multiplied; None: packed E2M1 goes to the
    tensor cores as it is. Where bases are given, only what lies in the (fit_m, fit_n) tiles that `_integers` left."""
    dual: tl.constexpr = w_outer_ptr is not None
    top, left = _tile(m, n, tile_m, tile_n)
    row, column = top + tl.arange(0, tile_m), left + tl.arange(0, tile_n)
    wanted = True
    if a_base_ptr is not None:
        rows_fit = _all_fit(a_base_ptr, top // fit_m * fit_m, m, groups, fit_m, wide)
        wanted = (rows_fit & _all_fit(w_base_ptr, left // fit_n * fit_n, n, groups, fit_n, wide)) == 0
    if wanted:
        acc = _start(bias_ptr, column, n, tile_m, tile_n, dual)
        for group in range(groups):
            # In each group from zero: a tensor core's accumulator cuts what is added to it, an addition in fp32 rounds.
            part = tl.zeros((tile_m, tile_n), tl.float32)
            for first in range(group * _GROUP, tl.minimum(group * _GROUP + _GROUP, k), step):
                if operands is None:
                    a, a_byte = load_packed(a_ptr, a_scale_ptr, row, first, m, k, step)
                    w, w_byte = load_packed(w_ptr, w_scale_ptr, column, first, n, k, step)
                    part = tl.dot_scaled(a, a_byte, "e2m1", tl.trans(w), w_byte, "e2m1", part)
                else:
                    w = load_values(w_ptr, w_scale_ptr, column, first, n, k, tile_n, step, w_element)
                    w = cut(w) if operands == tl.bfloat16 else w
                    if a_element is None:
                        at = first + tl.arange(0, step)
                        inside = (row[:, None] < m) & (at[None, :] < k)
                        a = tl.load(a_ptr + row.to(tl.int64)[:, None] * k + at[None, :], mask=inside, other=0.0)
                        a = a.to(operands)
                    else:
                        a = cut(load_values(a_ptr, a_scale_ptr, row, first, m, k, tile_m, step, a_element))
                    part = tl.dot(a, tl.trans(w), part, input_precision=precision)
            acc = _added(acc, part, a_outer_ptr, w_outer_ptr, row, column, group, groups, m, n)
        _finish(acc, bias_ptr, out_ptr, row, column, m, n, limit, dual)


def multiply(a: Packed | Tensor, w: Packed, bias: Tensor | None, out: Tensor, route: str) -> None:
    """Fill out (M, N) with activations (M, K) times weights (N, K).

    Args:
        a: packed, or floats.
        w: packed; its outer scale makes the sum one of groups.
        bias: (N,) of any float dtype, or None.
        out: bf16, fp16 or fp32; contiguous, like all others.
        route: how E2M1 operands are multiplied: "int8", "fp4" (as they are) or "bf16". All others are as floats.
    """
    (m, n), k = out.shape, w.shape[1]
    groups = triton.cdiv(k, GROUP)
    limit = torch.finfo(out.dtype).max
    if isinstance(a, Packed):
        a_codes, a_scale, a_outer, a_element = a.codes, a.scale, a.outer, a.format.element.name
    else:
        a_codes, a_scale, a_outer, a_element = a, None, None, None
    w_element = w.format.element.name
    # fp16 has as many significant bits as tf32, and E2M1 under any scale has fewer: no product is rounded before it is added.
    operands = tl.bfloat16 if a_element or a_codes.dtype is torch.bfloat16 else tl.float32
    precision = "tf32" if a_codes.dtype is torch.float16 else "ieee"
    four_bit = a_element == w_element == "e2m1"
    settings = FLOATS
    if operands is tl.float32:  # twice the bytes: sm_86's shared memory has room for two buffers
        settings = FLOATS | {"step": FLOATS["step"] // 2, "num_stages": 2}
    if four_bit and route == "fp4":
        operands, settings = None, FLOATS | {"step": 128}
    integers = four_bit and route == "int8"
    w_folded, w_base = fold(w.codes, w.scale, k) if integers else (None, None)
    tile_m, tile_n, wide = INTEGERS["tile_m"], INTEGERS["tile_n"], triton.next_power_of_2(groups)
    step = max(tile_m, FOLDED // k // tile_m * tile_m) if integers else m
    for first in range(0, m, step):
        rows = slice(first, first + step)
        part, scale, outer = (None if t is None else t[rows] for t in (a_codes, a_scale, a_outer))
        result = out[rows]
        folded = a_base = None
        if integers:
            assert part is not None and scale is not None and w_folded is not None
            folded, a_base = fold(part, scale, k)
            _integers[_grid(result, INTEGERS)](
                folded, w_folded, a_base, w_base, outer, w.outer, bias, result, len(result), n, folded.shape[1], groups, limit,
                wide=wide, **INTEGERS,
            )  # fmt: skip
        _floats[_grid(result, settings)](
            part, scale, w.codes, w.scale, a_base, w_base, outer, w.outer, bias, result, len(result), n, k, groups, limit,
            a_element, w_element, operands, precision, tile_m, tile_n, wide=wide, **settings,
        )  # fmt: skip
        del folded, a_base  # before the next rows' are made


def _grid(out: Tensor, settings: Mapping[str, Any]) -> tuple[int]:
    return (triton.cdiv(out.shape[0], settings["tile_m"]) * triton.cdiv(out.shape[1], settings["tile_n"]),)
