"""The codec next to the oracle: what the proofs share."""

from __future__ import annotations

import numpy as np
import torch

import mxdit
import oracle

KINDS = {torch.bfloat16: oracle.BF16, torch.float16: oracle.FP16, torch.float32: oracle.FP32}


def single_codes(packed: mxdit.Packed) -> np.ndarray:
    codes = packed.codes.numpy()
    return codes if packed.format.per_byte == 1 else oracle.unpack(codes)


def assert_as_oracle(x: torch.Tensor, fmt: str, rule: str, mode: str, mul_scale: torch.Tensor | None = None) -> None:
    """Single-level codes and scales of x (rows, K) are the oracle's."""
    packed = mxdit.encode(x, fmt, rule, mode, mul_scale)
    values = x.double().numpy()
    if mul_scale is not None:
        values = oracle.to_float(values * mul_scale.to(x.dtype).double().numpy(), KINDS[x.dtype])
    codes, byte = oracle.encode(values, fmt, rule, mode, KINDS[x.dtype])
    np.testing.assert_array_equal(packed.scale.numpy(), byte)
    np.testing.assert_array_equal(single_codes(packed), codes)


def assert_as_dual_oracle(x: torch.Tensor, mode: str, mul_scale: torch.Tensor | None = None) -> None:
    packed = mxdit.encode(x, "mxfp4_dualscale", round_mode=mode, mul_scale=mul_scale)
    multiplier = None if mul_scale is None else mul_scale.double().numpy()
    codes, l0, l1 = oracle.encode_dual(x.double().numpy(), mode, KINDS[x.dtype], multiplier)
    assert packed.outer is not None
    np.testing.assert_array_equal(packed.outer.double().numpy(), l0)
    np.testing.assert_array_equal(packed.scale.numpy(), l1)
    np.testing.assert_array_equal(single_codes(packed), codes)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 numbers of a 16-bit dtype, (65536,)."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def dual(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.mxdit.quantize_dual(x, None, "rint")


def exact_values(codes: torch.Tensor, scale: torch.Tensor, fmt: str) -> np.ndarray:
    """float64 values of codes, by the oracle, without an outer scale."""
    single = codes.numpy() if fmt == "mxfp8" else oracle.unpack(codes.numpy())
    return oracle.values(single, scale.numpy(), fmt)
