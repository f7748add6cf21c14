"""The definition of the numerics: encode, decode, and the container for what lies between.

Everything here is plain torch, runs on every device, and is what a backend has to equal bit for bit. The normative
text is docs/numerics.md; each function names its section. Work is done in row chunks, in place on one fp32 scratch,
so that a 13824 x 5120 weight needs a few MB beside its result.

Two choices keep it short. Scales are worked out on the block maxima alone, as exponent fields in int32. Codes are
worked out for any small float at once: divide by the quantum of the value's binade (a power of two, so exactly), round
that to an integer, and add the binade's first code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mxdit.numerics.checks import check_encode, check_float, check_packed, check_scales
from mxdit.numerics.formats import BlockFormat, Element, block_format
from mxdit.numerics.scales import (
    exponent_field,
    given_scale,
    level_one_scale,
    level_zero_scale,
    power_of_two,
    single_scale,
)

_CHUNK = {"cpu": 1 << 18}  # elements worked on at once; a CPU wants its scratch in cache
_CHUNK_ELSEWHERE = 1 << 24


class Scales(NamedTuple):
    """What the codes of a packed tensor are multiplied by.

    Attributes:
        scale: uint8 E8M0, (..., ceil(K/32)); byte b means 2**(b-127), 0xFF means that the whole block is NaN.
        outer: fp32, (..., ceil(K/512)), or None where the format has no outer scale.
    """

    scale: Tensor
    outer: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Packed:
    """A quantized tensor in canonical layout: row-major, last axis K, nothing padded.

    Attributes:
        codes: uint8, (..., K/2) for four-bit formats with element 2i in the low nibble, (..., K) for eight-bit ones.
        scale: uint8 E8M0, (..., ceil(K/32)); byte b means 2**(b-127), 0xFF means that the whole block is NaN.
        outer: fp32, (..., ceil(K/512)), or None where the format has no outer scale.
        fmt: the format's name.
    """

    codes: Tensor
    scale: Tensor
    outer: Tensor | None
    fmt: str

    @property
    def format(self) -> BlockFormat:
        """The format's row."""
        return block_format(self.fmt, where="Packed")

    @property
    def scales(self) -> Scales:
        """Its scales, as `encode` takes them."""
        return Scales(self.scale, self.outer)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that was encoded."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * self.format.per_byte))

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales included."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.outer) if t is not None)


# -- encode ------------------------------------------------------------------------------------------------------------


def encode(
    x: Tensor,
    fmt: str,
    rule: str | None = None,
    round_mode: str = "rint",
    mul_scale: Tensor | None = None,
    *,
    scales: Scales | None = None,
) -> Packed:
    """Quantize along the last axis: choose scales by a rule, or take those that are given, and round under them.

    Args:
        x: (..., K) bf16, fp16 or fp32 (``mxfp4_dualscale``: bf16 or fp16, like its operator). K is even for four-bit
            formats; a last block or group that is not full counts as filled with zeros.
        fmt: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``.
        rule: how the E8M0 scale follows from the block maximum: ``ocp``, ``uos``, ``even6``, ``even7`` for mxfp4;
            ``ocp``, ``cublas`` for mxfp8; ``ocp`` for mxfp4_dualscale. None means the format's default.
        round_mode: ``rint`` (to nearest, ties to even), ``round`` (ties away from zero) or ``floor`` (toward -inf);
            mxfp8 takes only ``rint``.
        mul_scale: (K,), four-bit formats only: multiplied into x first, in x's dtype, with one rounding.
        scales: the scales to round under, as a search or GPTQ chose them; ``rule`` is then not used. A code is the one
            nearest to x / outer (in x's dtype, section 3.2) * 2**(127 - scale), saturated. Byte 0 means 2**-127 as it does
            to `decode`; an outer scale of 0 divides by one. Values of the scales are not checked.

    Returns:
        Packed. A block that holds an inf or a NaN, or is given under 0xFF, gets scale 0xFF and zero codes.
        Under the scales that a rule chose, the codes are that rule's, but for blocks of byte 0 that ``ocp``, ``even6``
        and ``even7`` make zeros.

    Raises:
        FormatError: when the names, the dtype or the shapes are not the format's.

    Source: docs/numerics.md sections 2, 3 and 5.3.
    """
    row = block_format(fmt, where="encode")
    rule = row.default_rule if rule is None else rule
    check_encode(x, row, rule, round_mode, mul_scale, where="encode")
    lead, k = x.shape[:-1], x.shape[-1]
    if scales is not None:
        check_scales(scales.scale, scales.outer, row, lead, k, where="encode")
    codes = x.new_empty((*lead, k // row.per_byte), dtype=torch.uint8)
    scale = x.new_empty((*lead, row.blocks(k)), dtype=torch.uint8)
    outer = x.new_empty((*lead, row.groups(k)), dtype=torch.float32) if row.outer else None
    if mul_scale is not None:
        mul_scale = mul_scale.to(x.dtype)
    rows, rows_codes, rows_scale = x.reshape(-1, k), _rows(codes), _rows(scale)
    given, given_outer = (None, None) if scales is None else (_rows(scales.scale), scales.outer)
    for part in _row_chunks(rows):
        byte = None if given is None else given[part]
        x_part = rows[part] if mul_scale is None else rows[part] * mul_scale
        if outer is None:
            rows_codes[part], rows_scale[part] = _encode_single(x_part, row, rule, round_mode, byte)
        else:
            l0 = None if given_outer is None else _rows(given_outer)[part]
            rows_codes[part], rows_scale[part], _rows(outer)[part] = _encode_dual(x_part, row, round_mode, byte, l0)
    return Packed(codes, scale, outer, fmt)


def _encode_single(
    x: Tensor, row: BlockFormat, rule: str, round_mode: str, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of (rows, K); docs/numerics.md sections 2.2 to 2.5."""
    v = _blocked(x.float(), row.block, x.dtype is torch.float32)
    if given is None:
        byte, reciprocal = single_scale(v.abs().amax(-1), row, rule, x.dtype)
    else:
        byte, reciprocal = given_scale(v, given)
    v *= reciprocal[..., None]
    return _pack(_codes(v, row.element, round_mode, x.dtype), x.shape[-1], row), byte.to(torch.uint8)


def _encode_dual(
    x: Tensor, row: BlockFormat, round_mode: str, given: Tensor | None, given_l0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, level-1 and level-0 scales of (rows, K); docs/numerics.md section 3.2."""
    k = x.shape[-1]
    assert row.outer is not None
    width = row.outer if k > row.outer else row.blocks(k) * row.block  # no need to pad a single short group to 512
    groups = _blocked(x.float(), width, False)
    l0 = level_zero_scale(groups) if given_l0 is None else given_l0
    # Where l0 was flushed, x / l0 is +-inf for any nonzero x: divide by one, which keeps zeros, and say inf below.
    groups /= torch.where(l0 == 0, 1.0, l0)[..., None]
    t = groups.to(x.dtype).float().view(x.shape[0], -1, row.block)  # the quotient goes back to x's dtype before level 1
    if given is None:
        block_max = t.abs().amax(-1)
        flushed = (l0 == 0).repeat_interleave(width // row.block, -1) & (block_max > 0)
        byte, reciprocal = level_one_scale(block_max.masked_fill_(flushed, torch.inf), row)
    else:
        byte = F.pad(given, (0, t.shape[1] - given.shape[1]), value=127)  # what is padded is cut off again
        byte, reciprocal = given_scale(t, byte)
    t *= reciprocal[..., None]
    byte = byte[:, : row.blocks(k)].to(torch.uint8)
    return _pack(_codes(t, row.element, round_mode, x.dtype), k, row), byte, l0


def _blocked(x: Tensor, width: int, shared: bool) -> Tensor:
    """(rows, K) as (rows, ceil(K/width), width) with zeros behind, in memory that may be overwritten.

    ``shared`` says that x is still the caller's memory.
    """
    short = -x.shape[-1] % width
    x = F.pad(x, (0, short)) if short else x.clone() if shared else x
    return x.reshape(x.shape[0], -1, width)


def _codes(v: Tensor, element: Element, round_mode: str, dtype: torch.dtype) -> Tensor:
    """Codes, one per uint8, of scaled values ``v`` (fp32, overwritten); docs/numerics.md section 1.

    NaN becomes +0 (section 8, choices 2 and 3), out of range saturates, the sign of zero is kept.
    """
    if dtype is torch.bfloat16 and round_mode == "floor":
        # The product is a bf16 one: a negative that underflows there is -0, where fp32 would still floor it to -0.5.
        v = v.bfloat16().float()
    v.nan_to_num_(0.0).clamp_(-element.max, element.max)
    sign = (v.view(torch.int32) >> 31) & (1 << (element.bits - 1))
    first = 128 - element.bias  # exponent field of the lowest normal binade, whose quantum the subnormals share
    exponent = exponent_field(v).clamp_min_(first)
    v *= power_of_two(254 + element.mantissa - exponent)
    _round(v, round_mode)
    binade = exponent.sub_(first).bitwise_left_shift_(element.mantissa)
    return v.abs_().to(torch.int32).add_(binade).bitwise_or_(sign).to(torch.uint8)


def _round(v: Tensor, round_mode: str) -> Tensor:
    """Round to integers in place; ``round`` gives magnitudes only, which is all that its caller needs."""
    if round_mode == "rint":
        return v.round_()
    if round_mode == "floor":
        return v.floor_()
    return v.abs_().mul_(2).floor_().add_(1).mul_(0.5).floor_()  # ties away from zero, each step exact


def _pack(codes: Tensor, k: int, row: BlockFormat) -> Tensor:
    """(rows, ..., width) single codes to (rows, K / codes per byte) bytes, low nibble first, padding cut off."""
    codes = codes.view(codes.shape[0], -1)[:, :k]
    if row.per_byte == 1:
        return codes
    pairs = codes.contiguous().view(torch.int16)  # low byte is the even element on every device torch runs on
    return (pairs | (pairs >> 4)).to(torch.uint8)


# -- decode ------------------------------------------------------------------------------------------------------------


def decode(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a Packed, (..., K) in ``dtype``.

    code x 2**(scale-127) is exact in fp32, the outer scale multiplies it with one fp32 rounding, and the cast to
    ``dtype`` is the usual one (to nearest even, inf beyond its range). Scale 0xFF decodes to NaN.

    Raises:
        FormatError: when the parts do not fit each other.

    Source: docs/numerics.md section 1; scale byte 0 is 2**-127 (section 8, choice 1).
    """
    row = packed.format
    check_packed(packed.codes, packed.scale, packed.outer, row, where="decode")
    check_float(dtype, where="decode")
    out = packed.codes.new_empty(packed.shape, dtype=dtype)
    k = out.shape[-1]
    rows, codes, scale = _rows(out), _rows(packed.codes), _rows(packed.scale)
    for part in _row_chunks(rows):
        values = decode_blocks(codes[part], scale[part], row)
        if packed.outer is not None and row.outer:
            values *= _rows(packed.outer)[part].repeat_interleave(row.outer, -1)[:, :k]
        rows[part] = values
    return out


def decode_blocks(codes: Tensor, scale: Tensor, row: BlockFormat) -> Tensor:
    """fp32 (rows, K) of packed rows without their outer scale: code x 2**(scale-127), which is exact."""
    rows, k = codes.shape[0], codes.shape[1] * row.per_byte
    values = _look_up(_byte_values(row.element), codes)
    values = values.view(torch.float32).view(rows, k)  # a four-bit entry holds the two values of its byte
    factors = _look_up(_scale_values(), scale).view(rows, -1, 1)
    if k % row.block:
        values *= factors.expand(-1, -1, row.block).reshape(rows, -1)[:, :k]
    else:
        values.view(rows, -1, row.block).mul_(factors)
    return values


def _look_up(table: np.ndarray, index: Tensor) -> Tensor:
    """Entries of a small table, (index.numel(),). The table is not kept as a tensor: it would belong to a device or mode."""
    return torch.as_tensor(table, device=index.device).index_select(0, index.reshape(-1).int())


def element_values(element: Element) -> list[float]:
    """The value of every code, in code order; the two codes of E4M3 above its maximum are NaN."""
    values = []
    for code in range(1 << (element.bits - 1)):
        field, fraction = code >> element.mantissa, code & ((1 << element.mantissa) - 1)
        significand = fraction + ((1 << element.mantissa) if field else 0)
        value = significand * 2.0 ** (max(field, 1) - element.bias - element.mantissa)
        values.append(value if value <= element.max else float("nan"))
    return values + [-value for value in values]


@cache
def _byte_values(element: Element) -> np.ndarray:
    """What each of the 256 bytes holds: fp32 values, or pairs of them seen as int64 so that one lookup fetches both."""
    values = np.array(element_values(element), dtype=np.float32)
    if element.bits == 8:
        return values
    byte = np.arange(256)
    return np.stack((values[byte & 15], values[byte >> 4]), -1).view(np.int64).squeeze(-1)


@cache
def _scale_values() -> np.ndarray:
    """2**(b-127) for the 256 scale bytes, NaN for 0xFF."""
    return np.array([2.0 ** (b - 127) for b in range(255)] + [np.nan], dtype=np.float32)


# -- shared ------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    """Slices over the rows, each of about the number of elements that the device likes to work on at once."""
    step = max(1, _CHUNK.get(rows.device.type, _CHUNK_ELSEWHERE) // rows.shape[1])
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))
