"""A Triton kernel that attends exactly: products on tensor cores with fp32 accumulators (of fp32 in fp32), softmax in fp32, a
tile of keys at a time: what was summed so far is rescaled whenever a tile brings a higher logit. Weights are rounded to v's
dtype before they multiply it. No order of sums is promised: numbers agree with the reference to a tolerance.

A program has ``tile_q`` queries of one head, and neighbours share the head, whose keys and values are then in cache.
"""

# Kernels are in Triton's language, whose types are not Python's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportReturnType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxdit.backends.triton_codec import widen

LOG2_E = 1.4426950408889634


@triton.jit
def _place(queries, heads, tile_q: tl.constexpr):
    """This program's batch entry, head and queries."""
    tiles = tl.cdiv(queries, tile_q)
    entry = (tl.program_id(0) // tiles).to(tl.int64)
    return entry // heads, entry % heads, tl.program_id(0) % tiles * tile_q + tl.arange(0, tile_q)


@triton.jit
def _tokens(ptr, token, stride, count, width: tl.constexpr, wide: tl.constexpr, edge: tl.constexpr):
    """(tokens, wide) of one head. Channels from ``width`` on are zeros, and at an ``edge`` tokens from ``count`` on."""
    channel = tl.arange(0, wide)
    at = ptr + token.to(tl.int64)[:, None] * stride + channel[None, :]
    if edge:
        found = tl.load(at, mask=(token[:, None] < count) & (channel[None, :] < width), other=0.0)
    elif width < wide:
        found = tl.load(at, mask=channel[None, :] < width, other=0.0)
    else:
        found = tl.load(at)
    return found  # the only return: Triton compiles what comes after one


@triton.jit
def _masked(logits, mask_ptr, query, key, queries, keys, query_stride, key_stride, by_key: tl.constexpr):
    """Logits under the mask of one head: bytes say which keys take part, floats are added."""
    at = mask_ptr + key.to(tl.int64)[None, :] * key_stride
    if not by_key:
        at += tl.minimum(query, queries - 1).to(tl.int64)[:, None] * query_stride
    found = tl.load(at, mask=key[None, :] < keys, other=0)
    if found.dtype == tl.uint8:
        logits = tl.where(found != 0, logits, float("-inf"))
    else:
        logits += widen(found)
    return logits


@triton.jit
def _exact(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, queries, keys, heads, shared, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, mask_batch, mask_head, mask_query, mask_key, scale, unit: tl.constexpr, causal: tl.constexpr,
    by_key: tl.constexpr, width: tl.constexpr, v_width: tl.constexpr, wide: tl.constexpr, v_wide: tl.constexpr,
    tile_q: tl.constexpr, tile_k: tl.constexpr,
):  # fmt: skip
    """``shared``: how many heads of q read one of k and v. ``scale``: of logits of which a ``unit`` is a factor of 2. ``by_key``:
    whether the mask is one row for all queries."""
    batch, head, query = _place(queries, heads, tile_q)
    source = head // shared
    k_ptr += batch * k_batch + source * k_head
    v_ptr += batch * v_batch + source * v_head
    q = _tokens(q_ptr + batch * q_batch + head * q_head, query, q_token, queries, width, wide, True)
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    end = keys
    whole = keys // tile_k * tile_k
    if causal:  # no key after the last query; and up to the first one all of them
        end = tl.minimum(keys, tl.max(query, 0) + 1)
        whole = tl.minimum(keys, tl.min(query, 0)) // tile_k * tile_k
    highest = tl.full((tile_q,), float("-inf"), tl.float32)
    total = tl.zeros((tile_q,), tl.float32)
    acc = tl.zeros((tile_q, v_wide), tl.float32)
    for edge in tl.static_range(2):  # tiles that nothing has to be cut from, and then the others
        for first in range(whole if edge else 0, end if edge else whole, tile_k):
            key = first + tl.arange(0, tile_k)
            k = _tokens(k_ptr, key, k_token, keys, width, wide, edge)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if mask_ptr is not None:
                logits = _masked(logits, mask_ptr, query, key, queries, keys, mask_query, mask_key, by_key)
            if edge:
                seen = key[None, :] < keys
                if causal:
                    seen = seen & (key[None, :] <= query[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            risen = tl.maximum(highest, tl.max(logits, 1))
            base = tl.where(risen == float("-inf"), 0.0, risen)  # a query that has seen no key
            weights = tl.exp2((logits - base[:, None]) * unit)
            kept = tl.exp2((highest - base) * unit)
            total = total * kept + tl.sum(weights, 1)
            v = _tokens(v_ptr, key, v_token, keys, v_width, v_wide, edge)
            acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
            highest = risen
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    channel = tl.arange(0, v_wide)
    row = (batch * queries + query) * heads + head
    inside = (query[:, None] < queries) & (channel[None, :] < v_width)
    tl.store(out_ptr + row[:, None] * v_width + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


def settings(wide: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles and launch options for heads of so many channels, a power of two; docs/cuda.md has what compilers make of them."""
    tile_q, tile_k = (128, 64) if wide <= 128 else (64, 32)
    if dtype is torch.float32:  # no tensor core multiplies them: registers hold what is multiplied, too
        tile_q, tile_k = 64, 16
    return {"tile_q": tile_q, "tile_k": tile_k, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, out: Tensor) -> None:
    """Fill out (B, L, H, E), contiguous, with the op ``attention`` of q, k and v, whose channels lie side by side.

    Args:
        mask: expanded to (B, H, L, S), of bytes (not 0: the key takes part) or floats; or None.
    """
    batch, queries, heads, width = q.shape
    v_width = v.shape[3]
    wide, v_wide = (max(16, triton.next_power_of_2(size)) for size in (width, v_width))
    # The lowest floats, which some masks hold, would not be finite in base 2.
    factor, unit = (LOG2_E, 1.0) if mask is None or mask.dtype is torch.uint8 else (1.0, LOG2_E)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    chosen = settings(max(wide, v_wide), q.dtype)
    _exact[(triton.cdiv(queries, chosen["tile_q"]) * batch * heads,)](
        q, k, v, mask, out, queries, k.shape[1], heads, heads // k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *mask_strides, scale * factor, unit, causal, not mask_strides[2], width, v_width, wide, v_wide, **chosen,
    )  # fmt: skip
