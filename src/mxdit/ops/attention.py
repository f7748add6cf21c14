"""The op ``attention``: softmax(q k^T) v, by a method of `mxdit.numerics.attention`.

A function that is named like an op is its reference; ``prepare_`` checks an op's arguments and makes room for its result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics.attention import METHODS

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ORDER = "(batch, tokens, heads, width)"
_INT8_WIDTH = 1 << 17  # times 127**2 is less than 2**31


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str) -> Tensor:
    """softmax(scale x q k^T + mask) v over the tokens of k, in the order of axes that diffusers' backends have.

    Args:
        q: (B, L, H, D) of bf16, fp16 or fp32.
        k: (B, S, G, D) of the same dtype. G divides H: head h reads k's and v's head h // (H / G).
        v: (B, S, G, E) of the same dtype.
        mask: what broadcasts to (B, H, L, S): bool, True where a key takes part, or a float dtype, added to the logits;
            None for no mask.
        scale: of the products, commonly D^-1/2.
        causal: whether query i sees keys 0 to i only. Not beside a mask.
        method: of `mxdit.numerics.attention.METHODS`. ``int8`` takes D up to 2**17.

    Returns:
        (B, L, H, E), in q's dtype. A query that sees no key gets zeros.
    """
    result = prepare_attention(q, k, v, mask, scale, causal, method)
    if not result.numel():
        return result
    heads = q.shape[2]
    if mask is not None:
        mask = mask.expand(q.shape[0], heads, q.shape[1], k.shape[1])
    for at in range(q.shape[0]):
        for head in range(heads):
            source = head // (heads // k.shape[2])
            own = None if mask is None else mask[at, head]
            out = METHODS[method](q[at, :, head], k[at, :, source], v[at, :, source], own, scale, causal)
            result[at, :, head] = out.to(q.dtype)
    return result


def prepare_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str
) -> Tensor:
    """Check the arguments of `attention`, and make room for what it returns."""
    where = "mxdit::attention"
    if method not in METHODS:
        raise FormatError("no such method", where=where, got=repr(method), expected=" or ".join(map(repr, METHODS)))
    if any(x.dim() != 4 for x in (q, k, v)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise FormatError("q, k and v have four axes", where=where, got=shapes, expected=_ORDER)
    if q.dtype not in _DTYPES or k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise FormatError(
            "q, k and v are of one float dtype",
            where=where,
            got=f"{q.dtype}, {k.dtype}, {v.dtype}",
            expected=" or ".join(map(str, _DTYPES)),
        )
    (batch, queries, heads, width), (keys, sources) = q.shape, k.shape[1:3]
    if k.shape != (batch, keys, sources, width) or v.shape[:3] != (batch, keys, sources):
        raise FormatError(
            "k and v do not go with q",
            where=where,
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            expected=f"equal batches, q and k of one width, k and v of equal tokens and heads: {_ORDER}",
        )
    if not width or not v.shape[3] or (heads and (not sources or heads % sources)):
        raise FormatError(
            "heads of k that q's cannot share evenly, or heads without a width",
            where=where,
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
            expected="q's heads a multiple of k's",
        )
    if method == "int8" and width > _INT8_WIDTH:
        raise FormatError(
            "too wide for sums of 32 bits", where=where, got=f"width {width}", expected=f"{_INT8_WIDTH} at most in INT8"
        )
    if mask is not None:
        _check_mask(mask, (batch, heads, queries, keys), causal, where=where)
    return q.new_empty((batch, queries, heads, v.shape[3]))


def _check_mask(mask: Tensor, full: tuple[int, ...], causal: bool, *, where: str) -> None:
    if causal:
        raise FormatError("a mask and causal at once", where=where, expected="one of them")
    if mask.dtype is not torch.bool and mask.dtype not in _DTYPES:
        raise FormatError(
            "no mask of this dtype",
            where=where,
            got=mask.dtype,
            expected=" or ".join(map(str, (torch.bool, *_DTYPES))),
        )
    fits = mask.dim() <= 4 and all(have in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        raise FormatError(
            "the mask does not broadcast",
            where=where,
            got=tuple(mask.shape),
            expected=f"what broadcasts to (batch, heads, queries, keys) {full}",
        )
