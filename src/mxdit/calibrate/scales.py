"""Scales of a weight, searched for: E8M0 bytes and the fp32 scales above them, by the error that they leave.

A weight's error is counted by channel, each as important as the diagonal of the layer's Hessian says: how much its input is.
Rules (docs/numerics.md) look at a block's maximum alone.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mxdit.numerics.codec import Packed, Scales, decode_blocks, encode
from mxdit.numerics.formats import BlockFormat, Element, block_format
from mxdit.numerics.scales import exponent_field, power_of_two

# Steps from the byte of the OCP rule: a second one up is never better, one down clips half of a block.
AROUND = (0, -1, 1)
PER_OCTAVE = 16  # outer scales that are tried; what an octave more or less would change, the bytes can do
_CACHED = 1024  # rows of a group that a CPU's cache holds while every outer scale is tried: twice as fast
_TINY = torch.finfo(torch.float32).tiny


def nearest(v: Tensor, element: Element) -> Tensor:
    """The element's value that is nearest to each of v (fp32), ties to even, saturated (docs/numerics.md section 1)."""
    v = v.clamp(-element.max, element.max)
    field = exponent_field(v).clamp_min_(128 - element.bias)  # subnormals share the quantum of the lowest binade
    return (v * power_of_two(254 + element.mantissa - field)).round_() * power_of_two(field - element.mantissa)


def best_bytes(blocks: Tensor, importance: Tensor, row: BlockFormat) -> tuple[Tensor, Tensor]:
    """The E8M0 byte of each block that leaves the least weighted squared error, and that error.

    Args:
        blocks: (N, B, width) fp32, already divided by an outer scale.
        importance: (B, width) fp32, not negative.

    Returns:
        int32 (N, B) and fp32 (N, B). Of equal errors the first of `AROUND` wins: where no channel counts, nothing is clipped.
    """
    floor = exponent_field(blocks.abs().amax(-1)) - row.emax
    best = torch.full(floor.shape, torch.inf, device=blocks.device)
    byte = unit = floor.clamp(1, 253)
    for step in AROUND:
        tried = (floor + step).clamp_(1, 253)  # below and above, a scale and its inverse are not both normal numbers
        scaled = blocks * power_of_two(254 - tried)[..., None]
        error = (nearest(scaled, row.element) - scaled).square_().mul_(importance).sum(-1)
        error *= power_of_two(127 + tried - unit).square()  # in units of the block's own: its square may leave fp32
        better = error < best
        byte, best = torch.where(better, tried, byte), torch.where(better, error, best)
    return byte, best * power_of_two(unit).square()


def best_outer(group: Tensor, importance: Tensor, row: BlockFormat) -> Tensor:
    """The fp32 outer scale of each row that leaves the least weighted squared error, each with the best bytes under it.

    Args:
        group: (N, width) fp32, width a multiple of 32 up to 512.
        importance: (width,) fp32.

    Returns:
        fp32 (N,): 0 for a group of zeros, and for one that no normal number could scale.
    """
    top = group.abs().amax(-1) / row.max
    best, chosen = torch.full_like(top, torch.inf), torch.zeros_like(top)
    for step in range(PER_OCTAVE):
        share = 2.0 ** (-step / PER_OCTAVE)
        outer = top * share
        usable = outer >= _TINY
        inner = group / torch.where(usable, outer, 1.0)[:, None]
        _, error = best_bytes(inner.unflatten(-1, (-1, row.block)), importance.unflatten(-1, (-1, row.block)), row)
        total = error.sum(-1) * share**2  # over top^2, which may leave fp32
        better = usable & (total < best)
        best, chosen = torch.where(better, total, best), torch.where(better, outer, chosen)
    return chosen


def padded(x: Tensor, width: int) -> Tensor:
    """x with zeros behind it, up to a multiple of `width` along the last axis."""
    short = -x.shape[-1] % width
    return torch.nn.functional.pad(x, (0, short)) if short else x


def search(weight: Tensor, importance: Tensor, method: str) -> Packed:
    """The weight, rounded to nearest under searched scales.

    Args:
        weight: (N, K) fp32.
        importance: (K,) fp32: of a channel's error, such as its mean squared input.
        method: format of the weight.
    """
    row, k = block_format(method), weight.shape[1]
    w, importance = padded(weight, row.block), padded(importance, row.block)
    width = row.outer or w.shape[1]
    inner, outers, scale = torch.empty_like(w), [], []
    for start in range(0, w.shape[1], width):
        piece = slice(start, start + width)
        group, counts = w[:, piece], importance[piece]
        if row.outer:
            parts = group.split(_CACHED if group.device.type == "cpu" else max(1, len(group)))
            outers.append(torch.cat([best_outer(part, counts, row) for part in parts]))
            group = group / torch.where(outers[-1] > 0, outers[-1], 1.0)[:, None]
        blocks = group.unflatten(-1, (-1, row.block))
        byte, _ = best_bytes(blocks, counts.unflatten(-1, (-1, row.block)), row)
        factor = power_of_two(byte)[..., None]
        inner[:, piece] = (nearest(blocks / factor, row.element) * factor).flatten(1)
        scale.append(byte)
    return packed_of(inner[:, :k], torch.cat(scale, 1), torch.stack(outers, 1) if outers else None, method)


def packed_of(inner: Tensor, byte: Tensor, outer: Tensor | None, method: str) -> Packed:
    """A Packed of values that are on its grid already.

    Args:
        inner: (N, K) fp32: codes times 2**(byte - 127), without the outer scale.
        byte: int32 (N, ceil(K/32)).
        outer: fp32 (N, ceil(K/512)), or None.
    """
    scale = byte.to(torch.uint8)
    if outer is None:
        return encode(inner, method, scales=Scales(scale))
    # Under an outer scale of one, in the dtype that the operator takes: grid points have two significant bits.
    whole = encode(inner.bfloat16(), method, scales=Scales(scale, torch.ones_like(outer)))
    return Packed(whole.codes, whole.scale, outer, method)


def refit(packed: Packed, weight: Tensor, hessian: Tensor) -> Packed:
    """The same codes under the outer scales that leave the least (w - q) H (w - q)^T of each row: a linear system for each.

    With q = sum over g of c_g q_g, where q_g are the row's values in group g without their outer scale: A c = b,
    A_gg' = q_g H q_g', b_g = q_g H w. A row whose solution is not positive, or no better, keeps its scales.

    Args:
        packed: a weight in a format that has outer scales.
        weight: (N, K) fp32, what it stands for.
        hessian: (K, K) fp32.
    """
    outer, row = packed.outer, packed.format
    assert outer is not None and row.outer is not None
    inner = decode_blocks(packed.codes, packed.scale, row)
    edges = [*range(0, weight.shape[1], row.outer), weight.shape[1]]
    n, groups = outer.shape
    a = torch.empty(n, groups, groups, dtype=torch.float64, device=weight.device)
    b = torch.empty(n, groups, dtype=torch.float64, device=weight.device)
    for g, (start, stop) in enumerate(pairwise(edges)):
        reach = inner[:, start:stop] @ hessian[start:stop]  # q_g H
        b[:, g] = (reach * weight).sum(-1)
        for other, (first, last) in enumerate(pairwise(edges)):
            a[:, g, other] = (reach[:, first:last] * inner[:, first:last]).sum(-1)
    a = (a + a.mT) / 2
    own = a.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-6 * own + (own == 0))  # of each group's own size: they differ by orders of magnitude
    solution = torch.linalg.solve_ex(a + ridge, b[..., None])[0].squeeze(-1)

    def left(c: Tensor) -> Tensor:  # what the error is beside w H w
        return torch.einsum("ng,ngh,nh->n", c, a, c) - 2 * (b * c).sum(-1)

    before = outer.double()
    solution = torch.where(before > 0, solution.float().double(), before)  # a group of zeros stays one
    fits = torch.isfinite(solution).all(-1) & ((solution >= _TINY) | (before == 0)).all(-1)
    better = fits & (left(solution.nan_to_num()) < left(before))
    chosen = torch.where(better[:, None], solution, before).float()
    return Packed(packed.codes, packed.scale, chosen, packed.fmt)
