"""How scales are chosen: E8M0 bytes and the fp32 scales above them, on block maxima alone, as exponent fields in int32."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.numerics.formats import BlockFormat

UOS_MAX = 7.25  # block maxima are scaled into (3.625, 7.25]; above 6 they are clipped
_SIXTH = 1.0 / 6.0  # level 0 is a product with its fp32 value, 0x3E2AAAAB, not a quotient by six
_INVERSE_MAX = {"uos": 1.0 / UOS_MAX, "cublas": 1.0 / 448.0}  # products with their fp32 values again
_EVEN_CARRY = {"even6": 0x3F, "even7": 0x1F}  # added to a bf16 mantissa: carries when it is above 1.5 / above 1.75


def single_scale(amax: Tensor, row: BlockFormat, rule: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """E8M0 byte (int32) and reciprocal scale (fp32) of single-level blocks with maximum magnitude ``amax`` (fp32).

    Docs/numerics.md: ``ocp`` 2.2, ``cublas`` 2.4, ``even6`` and ``even7`` 2.5a, ``uos`` 2.5b.
    """
    exponent = exponent_field(amax)
    not_finite = exponent == 0xFF
    if rule in _INVERSE_MAX:
        bits = (amax * _INVERSE_MAX[rule]).view(torch.int32)
        byte, mantissa = bits >> 23, bits & 0x7FFFFF
        bump = (mantissa > 0) & (byte > 0)
        if rule == "cublas":
            bump |= (byte == 0) & (mantissa > 0x400000)
        byte = byte + bump
        empty = amax == 0
    else:
        if rule in _EVEN_CARRY:
            # The magnitude as a bf16 pattern: fp16 rounds to it, fp32 is cut to it, bf16 is it.
            rounded = amax.bfloat16().float() if dtype is torch.float16 else amax
            carried = ((rounded.view(torch.int32) >> 16) + _EVEN_CARRY[rule]) >> 7
            exponent = torch.where(exponent_field(rounded) < 2, 0, carried)
        byte = (exponent - row.emax).clamp_min_(0)
        empty = byte == 0
    return _reciprocal(byte, empty, not_finite)


def level_zero_scale(groups: Tensor) -> Tensor:
    """fp32 scale of groups (rows, G, width): their largest finite magnitude by six; docs/numerics.md section 3.2."""
    l0 = groups.nan_to_num(0.0, 0.0, 0.0).abs_().amax(-1) * _SIXTH
    return l0.masked_fill_(l0 < torch.finfo(torch.float32).tiny, 0.0)


def level_one_scale(amax: Tensor, row: BlockFormat) -> tuple[Tensor, Tensor]:
    """E8M0 byte (int32) and reciprocal scale (fp32) of dual-level blocks; docs/numerics.md section 3.2.

    Unlike the single-level rule, a block of exponent field 1 or 2 keeps its codes under byte 0.
    """
    exponent = exponent_field(amax)
    return _reciprocal((exponent - row.emax).clamp_min_(0), exponent == 0, exponent == 0xFF)


def given_scale(blocks: Tensor, byte: Tensor) -> tuple[Tensor, Tensor]:
    """E8M0 byte (int32) and reciprocal scale (fp32) of blocks (rows, B, 32) whose byte is given."""
    not_finite = (byte == 0xFF) | ~torch.isfinite(blocks).all(-1)
    byte, reciprocal = _reciprocal(byte.int(), torch.zeros_like(not_finite), not_finite)
    return byte, reciprocal.masked_fill_(
        byte == 0xFE, 2.0**-127
    )  # a subnormal, which has no exponent field; rules stay below


def _reciprocal(byte: Tensor, empty: Tensor, not_finite: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes with 0xFF where not finite, and 2**(127 - byte), 0 for empty blocks, NaN where not finite."""
    reciprocal = power_of_two(254 - byte)
    reciprocal.masked_fill_(empty, 0.0).masked_fill_(not_finite, torch.nan)
    return byte.masked_fill(not_finite, 0xFF), reciprocal


def exponent_field(x: Tensor) -> Tensor:
    """Exponent fields of an fp32 tensor, int32."""
    return (x.view(torch.int32) >> 23).bitwise_and_(0xFF)


def power_of_two(field: Tensor) -> Tensor:
    """The fp32 powers of two with these exponent fields (1 to 254)."""
    return (field << 23).view(torch.float32)
