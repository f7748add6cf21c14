"""The ops that bring numbers into a format and back: ``quantize``, ``quantize_dual``, ``dequantize``.

A function that is named like an op is its reference; ``prepare_`` checks an op's arguments and makes room for its results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics.checks import check_encode, check_float, check_packed
from mxdit.numerics.codec import Packed, decode, encode
from mxdit.numerics.formats import FORMATS, BlockFormat, block_format

_DUAL = FORMATS["mxfp4_dualscale"]


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """``npu_dynamic_mx_quant``: x (..., K) bf16, fp16 or fp32 to codes (..., K/2) (mxfp8: (..., K)) and scale
    (..., ceil(K/32)), both uint8."""
    _check_single(fmt)
    packed = encode(x, fmt, rule, round_mode)
    return packed.codes, packed.scale


def prepare_quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """Check the arguments of `quantize`, and make room for what it returns."""
    row = _check_single(fmt)
    check_encode(x, row, rule, round_mode, None, where="mxdit::quantize")
    return empty_packed(x, row)


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """``npu_dynamic_dual_level_mx_quant``: x (..., K) bf16 or fp16 to codes (..., K/2) uint8, l0 (..., ceil(K/512)) fp32
    and l1 (..., ceil(K/32)) uint8. ``mul_scale`` (K,) is cast to x's dtype."""
    packed = encode(x, _DUAL.name, None, round_mode, mul_scale)
    assert packed.outer is not None
    return packed.codes, packed.outer, packed.scale


def prepare_quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments of `quantize_dual`, and make room for what it returns."""
    check_encode(x, _DUAL, _DUAL.default_rule, round_mode, mul_scale, where="mxdit::quantize_dual")
    codes, l1 = empty_packed(x, _DUAL)
    return codes, x.new_empty((*x.shape[:-1], _DUAL.groups(x.shape[-1])), dtype=torch.float32), l1


def dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """The values of packed codes, (..., K) in ``dtype``; see `mxdit.decode`."""
    return decode(Packed(codes, scale, outer, fmt), dtype)


def prepare_dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """Check the arguments of `dequantize`, and make room for what it returns."""
    row = block_format(fmt, where="mxdit::dequantize")
    check_packed(codes, scale, outer, row, where="mxdit::dequantize")
    check_float(dtype, where="mxdit::dequantize")
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * row.per_byte), dtype=dtype)


def _check_single(fmt: str) -> BlockFormat:
    row = block_format(fmt, where="mxdit::quantize")
    if row.outer:
        raise FormatError(f"{fmt} has two scale levels", where="mxdit::quantize", hint="Call mxdit::quantize_dual.")
    return row


def empty_packed(x: Tensor, row: BlockFormat) -> tuple[Tensor, Tensor]:
    """Room for the codes and the E8M0 scales of x (..., K)."""
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // row.per_byte), dtype=torch.uint8)
    return codes, x.new_empty((*lead, row.blocks(k)), dtype=torch.uint8)
