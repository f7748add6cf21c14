"""What the data of a quantized linear's tensors must be. Each check takes (tensor, where) and returns the canonical tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mxdit.errors import CheckpointError, FormatError
from mxdit.numerics.checks import bf16_mul_scale


def as_is(tensor: Tensor, where: str) -> Tensor:
    """Codes of which all are numbers."""
    return tensor


def check_scale(scale: Tensor, where: str) -> Tensor:
    """E8M0 scales as uint8; CheckpointError for one that means NaN."""
    scale = scale.view(torch.uint8)
    bad = np.count_nonzero(scale.numpy() == 0xFF)
    if bad:
        raise CheckpointError(
            "scale bytes that mean NaN", where=where, got=f"0xFF at {bad} of {scale.numel()}", expected="0 to 0xFE"
        )
    return scale


def check_e4m3(codes: Tensor, where: str) -> Tensor:
    """E4M3 codes as uint8; CheckpointError for one that means NaN."""
    codes = codes.view(torch.uint8)
    bad = np.count_nonzero((codes.numpy() & 0x7F) == 0x7F)  # torch's sum of booleans needs eight bytes each
    if bad:
        raise CheckpointError(
            "E4M3 codes that mean NaN", where=where, got=f"0x7F or 0xFF at {bad} of {codes.numel()}", expected="numbers"
        )
    return codes


def check_dual(dual: Tensor, where: str) -> Tensor:
    """Dual scales as (N, groups, 1), on any device; CheckpointError for one that is negative or not finite."""
    bad = ~(torch.isfinite(dual) & (dual >= 0))
    if bool(bad.any()):
        raise CheckpointError(
            "a dual scale is negative or not finite",
            where=where,
            got=f"{float(dual[bad][0])} and {int(bad.sum()) - 1} more",
            expected="finite and at least 0",
        )
    return dual.view(*dual.shape[:2], 1)


def check_mul_scale(mul_scale: Tensor, where: str) -> Tensor:
    """(K,) fp32 that hold bf16 values, on any device; CheckpointError unless all are finite and positive in bf16."""
    try:
        return bf16_mul_scale(mul_scale, where=where)
    except FormatError as error:
        raise CheckpointError(
            error.what, where=where, got=error.got, expected=error.expected, hint=error.hint
        ) from None


SMALL = {"weight_dual_scale": check_dual, "mul_scale": check_mul_scale}
"""The checks that a load makes, too: what they read is small, and codes and scales stay mapped and untouched."""
