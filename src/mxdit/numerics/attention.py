"""Reference attention of one head, in plain torch.

Each method is a function of q (L, D), k (S, D), v (S, E), a mask that is None or (L, S) (bool, or floats that are added),
the scale of the logits, and whether query i sees keys 0 to i only. It gives (L, E) fp32, zeros for a query without a key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxdit.numerics.reference import fma

_PIECE = 1 << 22  # logits at once: 16 MB


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Products, softmax and sums in fp32, in no order of their own: backends agree to a tolerance."""
    k, v = k.float(), v.float()
    out = torch.empty(len(q), v.shape[1], dtype=torch.float32, device=q.device)
    rows = max(1, _PIECE // max(1, len(k)))
    for first in range(0, len(q), rows):
        part = slice(first, min(first + rows, len(q)))
        logits = masked(q[part].float() @ k.T * scale, None if mask is None else mask[part], first if causal else None)
        highest = logits.amax(1, keepdim=True) if len(k) else logits.new_zeros(len(logits), 1)
        weights = (logits - highest.clamp(min=torch.finfo(torch.float32).min)).exp()
        total = weights.sum(1, keepdim=True)
        out[part] = weights @ v / total.where(total > 0, 1)
    return out


def masked(logits: Tensor, mask: Tensor | None, first: int | None) -> Tensor:
    """Logits of some queries (rows, S), -inf where a query does not see a key: by its mask, or by its place, where ``first``
    is the place of the first of them."""
    if first is not None:
        places = torch.arange(first, first + len(logits), device=logits.device)[:, None]
        mask = torch.arange(logits.shape[1], device=logits.device) <= places
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else logits + mask.float()


# -- int8: docs/numerics.md section 10 -----------------------------------------------------------------------------------

KEYS = 64  # of a block: one maximum for each query, one scale for each channel of v
LOG2_E = float.fromhex("0x1.715476p+0")
INVERSE_127 = float.fromhex("0x1.020408p-7")
_SMALLEST = 2.0**-100  # what is below counts as zero, so that no scale and no inverse leaves fp32's range
_LOWEST = -32.0  # exp2 of less is 0
EXP2 = tuple(map(float.fromhex, ("0x1.3a0184p-7", "0x1.c9fd38p-5", "0x1.ec037ep-3", "0x1.62e12ap-1", "0x1p+0")))


def int8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Both products in INT8, of k without its mean; every rounding and the order of sums are defined."""
    shape, device = (len(q), v.shape[1]), q.device
    highest, total, acc = (torch.full((shape[0], 1), start, device=device) for start in (-math.inf, 0.0, 0.0))
    acc = acc.repeat(1, shape[1])
    k, v = k.float(), v.float()
    k = k - _mean(k)
    (q, q_scale), (k, k_scale) = _symmetric(q.float(), 1), _symmetric(k, 1)
    undefined = q_scale.isnan() | k_scale.isnan().any()
    k_scale = k_scale.nan_to_num(0.0)
    q_scale = q_scale.nan_to_num(0.0) * (torch.tensor(scale, dtype=torch.float32) * LOG2_E).item()
    for first in range(0, len(k), KEYS):
        block = slice(first, min(first + KEYS, len(k)))
        sums = (q.double() @ k[block].double().T).float()
        bias = torch.zeros_like(sums)
        if causal:
            queries, keys = (
                torch.arange(start, end, device=device) for start, end in ((0, len(q)), (first, block.stop))
            )
            bias.masked_fill_(keys > queries[:, None], -math.inf)
        elif mask is not None and mask.dtype is torch.bool:
            bias.masked_fill_(~mask[:, block], -math.inf)
        elif mask is not None:
            bias = mask[:, block].float() * LOG2_E
            undefined |= ~(bias < math.inf).all(1, keepdim=True)
            bias = bias.where(bias < math.inf, 0)
        logits = fma(sums * k_scale[block, 0], q_scale.expand_as(sums), bias)
        local = logits.amax(1, keepdim=True)
        weights = (exp2(logits - _finite(local)).double() * 255).round()
        codes, v_scale = _symmetric(v[block], 0)
        part = (weights @ codes.double()).float() * v_scale
        both = highest.maximum(local)
        new, old = exp2(local - _finite(both)), exp2(highest - _finite(both))
        sees = local > -math.inf
        acc = torch.where(sees, fma(part, new.expand_as(part), acc * old), acc)
        total = torch.where(sees, fma(weights.sum(1, keepdim=True).float(), new, total * old), total)
        highest = both
    out = torch.where(total > 0, acc * (1 / total), 0)
    return out.masked_fill(undefined & (total > 0), math.nan)


def exp2(x: Tensor) -> Tensor:
    """2^x of fp32 numbers up to 0, within 3e-6 of it; 0 below -32."""
    low = ~(x >= _LOWEST)
    x = x.masked_fill(low, 0)
    n = x.round()
    f = x - n
    p = torch.full_like(f, EXP2[0])
    for coefficient in EXP2[1:]:
        p = fma(p, f, torch.full_like(f, coefficient))
    return (p * (n.int() + 127).bitwise_left_shift(23).view(torch.float32)).masked_fill(low, 0)


def _finite(highest: Tensor) -> Tensor:
    """Maxima that can be subtracted where a query sees no key."""
    return highest.clamp(min=torch.finfo(torch.float32).min)


def _mean(x: Tensor) -> Tensor:
    """Of the rows, added in order: each block's, then the blocks' sums."""
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % KEYS)).reshape(-1, KEYS, x.shape[1])
    sums, total = torch.zeros_like(blocks[:, 0]), x.new_zeros(x.shape[1])
    for row in blocks.unbind(1):
        sums += row
    for block in sums:
        total += block
    return total * (1 / torch.tensor(max(1, len(x)), dtype=torch.float32)).item()


def _symmetric(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127, as fp32, and their scale along an axis; NaN where something there is not finite."""
    highest = x.abs().amax(dim, keepdim=True)
    plain = (highest >= _SMALLEST) & (highest < math.inf)
    inverse = torch.full_like(highest, 127) / highest  # 127 / highest would round twice
    codes = torch.where(plain, (x * inverse).round(), 0)
    return codes, torch.where(highest < _SMALLEST, 0, torch.where(plain, highest * INVERSE_127, math.nan))


METHODS = {"exact": exact, "int8": int8}
"""How attention is computed: its arithmetic, by name."""
