"""Triton kernels for attention in INT8: docs/numerics.md section 10, bit for bit.

k and v are quantized by kernels of their own, a block of keys in each program; then each program attends with a tile of queries,
which it quantizes itself. Tensor cores multiply signed bytes, so P goes in as P - 128, and 128 times the sum of v's codes is
added. Rounding to whole numbers is done by additions, quotients are `tl.div_rn`, nothing is fused but by `tl.fma`.

Importing this file imports Triton.
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

from mxdit.backends.triton_codec import LAUNCH, narrow, widen
from mxdit.numerics.attention import EXP2, INVERSE_127, KEYS, LOG2_E

ATTEND: dict[str, Any] = {"tile": 64, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
_NARROWEST = 32  # what int8 tensor cores take at once
_KEYS = tl.constexpr(KEYS)
_LOG2_E, _INVERSE_127 = tl.constexpr(LOG2_E), tl.constexpr(INVERSE_127)
_C4, _C3, _C2, _C1 = map(tl.constexpr, EXP2[:4])
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no room for fractions
_LOWEST = tl.constexpr(-32.0)  # of exp2
_NO_KEY = tl.constexpr(-3.4028234663852886e38)  # what can be subtracted where no key is seen


# -- arithmetic --------------------------------------------------------------------------------------------------------


@triton.jit
def exp2(x):
    """2^x of fp32 up to 0; 0 below -32."""
    inside = tl.maximum(x, _LOWEST)
    shifted = inside + _RINT
    f = inside - (shifted - _RINT)
    p = tl.full(f.shape, _C4, tl.float32)
    p = tl.fma(p, f, tl.full(f.shape, _C3, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, _C2, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, _C1, tl.float32))
    p = tl.fma(p, f, tl.full(f.shape, 1.0, tl.float32))
    power = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.where(x >= _LOWEST, power.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def symmetric(x, axis: tl.constexpr):
    """Codes, int8, and their scale along an axis, NaN where something there is not finite."""
    pattern = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)
    finite, live = pattern < 0x7F800000, pattern >= 0x0D800000  # 2^-100
    highest = tl.where(finite & live, pattern, 0x3F800000).to(tl.float32, bitcast=True)
    inverse = tl.expand_dims(tl.div_rn(tl.full(highest.shape, 127.0, tl.float32), highest), axis)
    plain = tl.expand_dims(finite & live, axis)
    codes = (tl.where(plain, x, 0.0) * inverse + _RINT) - _RINT
    scale = tl.where(finite, tl.where(live, highest * _INVERSE_127, 0.0), float("nan"))
    return codes.to(tl.int8), scale


@triton.jit
def _load_rows(x_ptr, batch, head, row, count, size, stride_batch, stride_row, stride_head, width: tl.constexpr):
    """(rows, width) fp32 of one head's tokens; 0 outside of (count, size)."""
    column = tl.arange(0, width)
    at = (
        batch.to(tl.int64) * stride_batch
        + row.to(tl.int64)[:, None] * stride_row
        + head.to(tl.int64) * stride_head
        + column[None, :]
    )
    return widen(tl.load(x_ptr + at, mask=(row[:, None] < count) & (column[None, :] < size), other=0.0))


# -- keys and values ---------------------------------------------------------------------------------------------------


@triton.jit
def _sums(k_ptr, sums_ptr, keys, heads, size, stride_batch, stride_row, stride_head, width: tl.constexpr):
    """Each block's keys, added one by one."""
    source, block = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, width)
    at = k_ptr + (source // heads).to(tl.int64) * stride_batch + (source % heads).to(tl.int64) * stride_head + column
    at += block.to(tl.int64) * _KEYS * stride_row
    total = tl.zeros((width,), tl.float32)
    for _ in range(tl.minimum(keys - block * _KEYS, _KEYS)):
        total += widen(tl.load(at, mask=column < size, other=0.0))
        at += stride_row
    tl.store(sums_ptr + (source.to(tl.int64) * tl.num_programs(1) + block) * width + column, total)


@triton.jit
def _mean(sums_ptr, mean_ptr, blocks, share, width: tl.constexpr):
    source, column = tl.program_id(0), tl.arange(0, width)
    total = tl.zeros((width,), tl.float32)
    at = sums_ptr + source.to(tl.int64) * blocks * width + column
    for _ in range(blocks):
        total += tl.load(at)
        at += width
    tl.store(mean_ptr + source * width + column, total * share)


@triton.jit
def _keys(
    k_ptr, mean_ptr, codes_ptr, scale_ptr, keys, heads, size, stride_batch, stride_row, stride_head, width: tl.constexpr
):
    source, block = tl.program_id(0), tl.program_id(1)
    row, column = block * _KEYS + tl.arange(0, _KEYS), tl.arange(0, width)
    x = _load_rows(
        k_ptr, source // heads, source % heads, row, keys, size, stride_batch, stride_row, stride_head, width
    )
    x = tl.where(row[:, None] < keys, x - tl.load(mean_ptr + source * width + column)[None, :], 0.0)
    codes, scale = symmetric(x, 1)
    at = source.to(tl.int64) * tl.num_programs(1) * _KEYS + row
    tl.store(codes_ptr + at[:, None] * width + column[None, :], codes)
    tl.store(scale_ptr + at, scale)


@triton.jit
def _values(
    v_ptr, codes_ptr, scale_ptr, sums_ptr, keys, heads, size, stride_batch, stride_row, stride_head, width: tl.constexpr
):
    """Codes as (channel, key), which is how tensor cores take them."""
    source, block = tl.program_id(0), tl.program_id(1)
    key, column = tl.arange(0, _KEYS), tl.arange(0, width)
    row = block * _KEYS + key
    x = _load_rows(
        v_ptr, source // heads, source % heads, row, keys, size, stride_batch, stride_row, stride_head, width
    )
    codes, scale = symmetric(x, 0)
    at = (source.to(tl.int64) * tl.num_programs(1) + block) * width + column
    tl.store(codes_ptr + at[None, :] * _KEYS + key[:, None], codes)
    tl.store(scale_ptr + at, scale)
    tl.store(sums_ptr + at, tl.sum(codes.to(tl.int32), axis=0))


# -- queries -----------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    q_ptr, k_ptr, k_scale_ptr, undefined_ptr, v_ptr, v_scale_ptr, v_sums_ptr, mask_ptr, out_ptr,
    queries, keys, heads, group, blocks, size, v_size, factor, q_batch, q_row, q_head,
    mask_batch, mask_head, mask_row, mask_key, causal: tl.constexpr, added: tl.constexpr, width: tl.constexpr,
    v_width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """``added``: whether the mask is of floats."""
    tiles = tl.cdiv(queries, tile)
    entry, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * tile
    batch, head = entry // heads, entry % heads
    source = (entry // group).to(tl.int64)  # heads of one source are neighbours
    row, key = first + tl.arange(0, tile), tl.arange(0, _KEYS)
    column, channel = tl.arange(0, width), tl.arange(0, v_width)
    q, q_scale = symmetric(_load_rows(q_ptr, batch, head, row, queries, size, q_batch, q_row, q_head, width), 1)
    undefined = (q_scale != q_scale) | (tl.load(undefined_ptr + source) != 0)
    q_scale = tl.broadcast_to(tl.where(q_scale == q_scale, q_scale, 0.0)[:, None] * factor, (tile, _KEYS))
    highest = tl.full((tile,), float("-inf"), tl.float32)
    total = tl.zeros((tile,), tl.float32)
    acc = tl.zeros((tile, v_width), tl.float32)
    if causal:
        blocks = tl.minimum(blocks, tl.cdiv(first + tile, _KEYS))
    for block in range(blocks):
        at = source * tl.cdiv(keys, _KEYS) + block
        k = tl.load(k_ptr + (at * _KEYS + key)[None, :] * width + column[:, None])
        k_scale = tl.load(k_scale_ptr + at * _KEYS + key)
        k_scale = tl.where(k_scale == k_scale, k_scale, 0.0)
        place = block * _KEYS + key
        bias = tl.broadcast_to(tl.where(place < keys, 0.0, float("-inf"))[None, :], (tile, _KEYS))
        if causal:
            bias = tl.where(place[None, :] > row[:, None], float("-inf"), bias)
        if mask_ptr is not None:
            where = batch.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
            where = where + row.to(tl.int64)[:, None] * mask_row + place.to(tl.int64)[None, :] * mask_key
            inside = (row[:, None] < queries) & (place[None, :] < keys)
            given = tl.load(mask_ptr + where, mask=inside, other=0)
            if added:
                given = widen(given) * _LOG2_E
                bad = (given != given) | (given == float("inf"))
                undefined = undefined | (tl.max(bad.to(tl.int32), axis=1) > 0)
                given = tl.where(bad, 0.0, given)
            else:
                given = tl.where(given != 0, 0.0, float("-inf"))
            bias = tl.where(inside, given, bias)
        products = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        logits = tl.fma(products * k_scale[None, :], q_scale, bias)
        local = tl.max(logits, axis=1)
        weights = exp2(logits - tl.maximum(local, _NO_KEY)[:, None])
        # P and 2^23, whose low bits are P: rounded once.
        weights = tl.fma(
            weights, tl.full(weights.shape, 255.0, tl.float32), tl.full(weights.shape, 8388608.0, tl.float32)
        )
        weights = weights.to(tl.int32, bitcast=True) & 0xFF
        v = tl.load(v_ptr + (at * v_width + channel)[None, :] * _KEYS + key[:, None])
        part = tl.dot((weights - 128).to(tl.int8), v, out_dtype=tl.int32)
        part += 128 * tl.load(v_sums_ptr + at * v_width + channel)[None, :]
        values = part.to(tl.float32) * tl.load(v_scale_ptr + at * v_width + channel)[None, :]
        both = tl.maximum(highest, local)
        finite = tl.maximum(both, _NO_KEY)
        new, old = exp2(local - finite), exp2(highest - finite)
        sees = local > float("-inf")
        acc = tl.where(
            sees[:, None], tl.fma(values, tl.broadcast_to(new[:, None], values.shape), acc * old[:, None]), acc
        )
        total = tl.where(sees, tl.fma(tl.sum(weights, axis=1).to(tl.float32), new, total * old), total)
        highest = both
    sees = total > 0
    inverse = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), tl.where(sees, total, 1.0))
    inverse = tl.where(undefined, float("nan"), inverse)
    result = tl.where(sees[:, None], acc * inverse[:, None], 0.0)
    to = ((batch.to(tl.int64) * queries + row) * heads + head)[:, None] * v_size + channel[None, :]
    inside = (row[:, None] < queries) & (channel[None, :] < v_size)
    tl.store(out_ptr + to, narrow(result, out_ptr.dtype.element_ty), mask=inside)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, out: Tensor) -> None:
    """Fill out, as `mxdit.ops.attention` has it; the last axis of q, k and v is contiguous.

    Args:
        mask: expanded to (B, H, L, S), of bytes (not 0: the key takes part) or floats; or None.
    """
    (batch, queries, heads, size), (keys, sources), v_size = q.shape, k.shape[1:3], v.shape[3]
    width, v_width = (max(_NARROWEST, triton.next_power_of_2(each)) for each in (size, v_size))
    # On a grid's first axis, since others have 65,535 programs at most: pixels are the batch of attention over time.
    blocks, all_sources = triton.cdiv(keys, KEYS), batch * sources

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    codes, k_scale = empty(all_sources, blocks * KEYS, width, dtype=torch.int8), empty(all_sources, blocks * KEYS)
    values = empty(all_sources, blocks, v_width, KEYS, dtype=torch.int8)
    v_scale, v_sums = empty(all_sources, blocks, v_width), empty(all_sources, blocks, v_width, dtype=torch.int32)
    if keys:
        sums, mean, grid = empty(all_sources, blocks, width), empty(all_sources, width), (all_sources, blocks)
        share = (1 / torch.tensor(keys, dtype=torch.float32)).item()
        _sums[grid](k, sums, keys, sources, size, *k.stride()[:3], width, **LAUNCH)
        _mean[(all_sources,)](sums, mean, blocks, share, width, **LAUNCH)
        _keys[grid](k, mean, codes, k_scale, keys, sources, size, *k.stride()[:3], width, **LAUNCH)
        _values[grid](v, values, v_scale, v_sums, keys, sources, v_size, *v.stride()[:3], v_width, **LAUNCH)
    undefined = k_scale.isnan().any(1).to(torch.int8)
    added = mask is not None and mask.dtype is not torch.uint8
    _attend[(triton.cdiv(queries, ATTEND["tile"]) * batch * heads,)](
        q, codes, k_scale, undefined, values, v_scale, v_sums, mask, out,
        queries, keys, heads, heads // sources, blocks, size, v_size,
        (torch.tensor(scale, dtype=torch.float32) * LOG2_E).item(), *q.stride()[:3],
        *((0,) * 4 if mask is None else mask.stride()), causal, added, width, v_width, **ATTEND,
    )  # fmt: skip
