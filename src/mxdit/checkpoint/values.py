"""What the data of a quantized tensor must be. Each check takes (tensor, where) and returns the tensor in canonical form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mxdit.errors import CheckpointError


def as_is(tensor: Tensor, where: str) -> Tensor:
    return tensor


def check_scale(scale: Tensor, where: str) -> Tensor:
    scale = scale.view(torch.uint8)
    bad = np.count_nonzero(scale.numpy() == 0xFF)
    if bad:
        raise CheckpointError(
            "scale bytes that mean NaN", where=where, got=f"0xFF at {bad} of {scale.numel()}", expected="0 to 0xFE"
        )
    return scale


def check_e4m3(codes: Tensor, where: str) -> Tensor:
    codes = codes.view(torch.uint8)
    bad = np.count_nonzero((codes.numpy() & 0x7F) == 0x7F)  # torch's sum of booleans needs eight bytes each
    if bad:
        raise CheckpointError(
            "E4M3 codes that mean NaN", where=where, got=f"0x7F or 0xFF at {bad} of {codes.numel()}", expected="numbers"
        )
    return codes


def check_dual(shape: tuple[int, ...], dual: Tensor, where: str) -> Tensor:
    bad = ~(torch.isfinite(dual) & (dual >= 0))
    if bool(bad.any()):
        raise CheckpointError(
            "a dual scale is negative or not finite",
            where=where,
            got=f"{float(dual[bad][0])} and {int(bad.sum()) - 1} more",
            expected="finite and at least 0",
        )
    return dual.view(shape)


def check_mul_scale(mul_scale: Tensor, where: str) -> Tensor:
    """(K,) fp32 that hold bf16 values; CheckpointError unless all are finite and positive in bf16."""
    rounded = mul_scale.to(torch.bfloat16).float()
    bad = ~(torch.isfinite(rounded) & (rounded > 0))
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        raise CheckpointError(
            "mul_scale is not finite and positive in bf16",
            where=where,
            got=f"{float(mul_scale[channel])} at channel {channel}",
            expected="above 0 and at most 3.39e38",
            hint="The calibration met a dead or broken channel: calibrate again.",
        )
    return rounded
