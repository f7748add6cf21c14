"""GPTQ on microscaling blocks: codes chosen one input channel after another, each making up for the error of those before.

Source: Frantar et al., "GPTQ", 2022 (arXiv 2210.17323), algorithm 1. Its scales are fixed beforehand; here a block's are chosen
when its turn comes, for what the channels before it have made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.calibrate.scales import best_bytes, best_outer, nearest, packed_of, padded
from mxdit.errors import InputError
from mxdit.numerics.codec import Packed
from mxdit.numerics.formats import block_format
from mxdit.numerics.scales import power_of_two

DAMPING = 0.01  # of the mean of the Hessian's diagonal; 0.001 to 0.1 differ by less than 0.05 dB
_MOST = 10.0
_SPAN = 512  # channels after which the rest of a weight without outer scales is brought up to date


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean(diag H) I)^-1, and the damping that it took.

    A Hessian that is not positive definite so far gets ten times the damping, until it is. Channels that no input ever
    reached count as if they had the mean importance: nothing is known of them, so their codes are those nearest to the weight.

    Args:
        hessian: (K, K), symmetric, fp32 or fp64.

    Raises InputError for a Hessian that holds what is no number.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise InputError("the inputs of a layer hold infs or NaNs", where="gptq", hint="Try BF16 or FP32 as the dtype.")
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(torch.where(diagonal > 0, damping * mean, mean))
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # no more than two matrices beside the Hessian: of 13824 channels each is 729 MiB
        if not bool(failed):
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not bool(failed):
                return factor, damping
        if damping >= _MOST:
            raise InputError("a layer's Hessian cannot be inverted", where="gptq", got=f"damping {damping}")
        damping *= 10


def gptq(weight: Tensor, hessian: Tensor, factor: Tensor, method: str) -> Packed:
    """The codes and scales of a weight whose error (w - q) H (w - q)^T is small.

    Args:
        weight: (N, K) fp32; linears that share their input may lie below each other.
        hessian: (K, K) fp32: mean of x^T x over inputs x as the layer multiplies them, that is quantized.
        factor: (K, K) fp32 from `inverse_factor`.
        method: format of the weight.
    """
    row = block_format(method)
    n, k = weight.shape
    # Transposed, so that a channel is contiguous.
    w = weight.mT.contiguous()
    inner = torch.empty_like(w)
    byte = torch.empty(row.blocks(k), n, dtype=torch.int32, device=w.device)
    outer = torch.zeros(row.groups(k), n, device=w.device) if row.outer else None
    importance, pivots = hessian.diagonal(), factor.diagonal().tolist()
    span = row.outer or _SPAN
    for start in range(0, k, span):
        stop = min(start + span, k)
        level = torch.ones(n, device=w.device)
        if outer is not None:
            outer[start // span] = best_outer(
                padded(w[start:stop].mT, row.block), padded(importance[start:stop], row.block), row
            )
            level = torch.where(outer[start // span] > 0, outer[start // span], level)
        errors = torch.empty(stop - start, n, device=w.device)
        for first in range(start, stop, row.block):
            last = min(first + row.block, stop)
            block = (w[first:last] / level).mT[:, None]
            byte[first // row.block] = best_bytes(block, importance[None, first:last], row)[0][:, 0]
            factor_of = power_of_two(byte[first // row.block])
            step, back = factor_of * level, 1 / factor_of
            for channel in range(first, last):
                value = nearest(w[channel] / level * back, row.element)
                inner[channel] = value * factor_of
                error = (w[channel] - value * step) / pivots[channel]
                errors[channel - start] = error
                w[channel + 1 : last] -= factor[channel, channel + 1 : last, None] * error
            w[last:stop] -= factor[first:last, last:stop].mT @ errors[first - start : last - start]
        w[stop:] -= factor[start:stop, stop:].mT @ errors
    del w
    return packed_of(
        inner.mT.contiguous(), byte.mT.contiguous(), None if outer is None else outer.mT.contiguous(), method
    )
