"""What the codec and the ops ask of their arguments: shapes, dtypes and names, so fake tensors are checked too."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics.formats import BlockFormat


def check_encode(
    x: Tensor, row: BlockFormat, rule: str, round_mode: str, mul_scale: Tensor | None, *, where: str
) -> None:
    """Raise the FormatError that says why x (..., K) cannot be encoded so, if it cannot."""
    if rule not in row.rules:
        raise FormatError(
            f"{row.name} has no such scale rule", where=where, got=repr(rule), expected=_one_of(row.rules)
        )
    if round_mode not in row.round_modes:
        raise FormatError(
            f"{row.name} has no such rounding mode",
            where=where,
            got=repr(round_mode),
            expected=_one_of(row.round_modes),
        )
    if x.dtype not in row.inputs:
        raise FormatError(
            f"{row.name} is not encoded from this dtype",
            where=where,
            got=x.dtype,
            expected=_one_of(row.inputs),
            hint="Cast to torch.bfloat16 first (docs/numerics.md section 3.1).",
        )
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % row.per_byte:
        raise FormatError(
            "the last axis is not whole bytes of codes",
            where=where,
            got=f"shape {tuple(x.shape)}",
            expected="(..., K) with K even and above 0" if row.per_byte == 2 else "(..., K) with K above 0",
            hint="Pad K with zeros; they change no scale.",
        )
    if mul_scale is not None:
        check_mul_scale(mul_scale, x.shape[-1], row, where=where)


def check_mul_scale(mul_scale: Tensor, k: int, row: BlockFormat, *, where: str) -> None:
    """Raise the FormatError that says why these multipliers do not go with K = ``k`` in this format, if they do not."""
    if not row.smooths:
        raise FormatError(f"{row.name} takes no mul_scale", where=where, hint="Only four-bit weights have one.")
    if tuple(mul_scale.shape) != (k,) or not mul_scale.is_floating_point():
        raise FormatError(
            "mul_scale does not fit the last axis of x",
            where=where,
            got=f"{tuple(mul_scale.shape)} {mul_scale.dtype}",
            expected=f"({k},) of a float dtype",
        )


def bf16_mul_scale(mul_scale: Tensor, *, where: str) -> Tensor:
    """The factors (K,) as devices multiply by them: fp32 that hold bf16 values, or a FormatError.

    Every one must be finite and positive, after it is rounded to bf16, too.
    """
    rounded = mul_scale.detach().to(torch.bfloat16).float()
    bad = ~(torch.isfinite(rounded) & (rounded > 0))
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        raise FormatError(
            "mul_scale is not finite and positive in bf16",
            where=where,
            got=f"{float(mul_scale[channel])} at channel {channel}",
            expected="above 0 and at most 3.39e38",
            hint="The calibration met a dead or broken channel: calibrate again.",
        )
    return rounded


def check_packed(codes: Tensor, scale: Tensor, outer: Tensor | None, row: BlockFormat, *, where: str) -> None:
    """Raise the FormatError that says why the parts are not one canonical tensor of this format, if they are not."""
    _check_bytes("codes", codes, row, where=where)
    check_scales(scale, outer, row, tuple(codes.shape[:-1]), codes.shape[-1] * row.per_byte, where=where)


def check_scales(
    scale: Tensor, outer: Tensor | None, row: BlockFormat, lead: tuple[int, ...], k: int, *, where: str
) -> None:
    """Raise the FormatError that says why these are not the scales of a (*lead, k) tensor of this format, if not."""
    lead, codes = tuple(lead), (*lead, k // row.per_byte)
    _check_bytes("scales", scale, row, where=where)
    if k == 0 or tuple(scale.shape) != (*lead, row.blocks(k)):
        raise FormatError(
            f"{row.name} scales do not fit codes {codes}",
            where=where,
            got=tuple(scale.shape),
            expected=(*lead, row.blocks(k)),
            hint=f"One scale per {row.block} elements of the last axis, neither padded nor paired.",
        )
    if (outer is None) != (row.outer is None):
        raise FormatError(
            f"{row.name} {'needs an' if row.outer else 'has no'} outer scale",
            where=where,
            got="none" if outer is None else f"{tuple(outer.shape)} {outer.dtype}",
        )
    if outer is not None and (outer.dtype is not torch.float32 or tuple(outer.shape) != (*lead, row.groups(k))):
        raise FormatError(
            f"{row.name} outer scales do not fit codes {codes}",
            where=where,
            got=f"{tuple(outer.shape)} {outer.dtype}",
            expected=f"{(*lead, row.groups(k))} torch.float32",
            hint=f"One fp32 scale per {row.outer} elements of the last axis; a cast to bf16 loses them.",
        )


def _check_bytes(name: str, part: Tensor, row: BlockFormat, *, where: str) -> None:
    if part.dtype is not torch.uint8 or part.dim() == 0:
        raise FormatError(
            f"{row.name} {name} are bytes",
            where=where,
            got=f"{tuple(part.shape)} {part.dtype}",
            expected="rows of torch.uint8",
            hint="View one-byte float dtypes as torch.uint8; that changes no bit.",
        )


def check_weight(
    w: Tensor, w_scale: Tensor, w_outer: Tensor | None, row: BlockFormat, bias: Tensor | None, k: int, *, where: str
) -> None:
    """Raise the FormatError that says why this is no (N, K) weight of a product with activations of K = ``k``."""
    check_packed(w, w_scale, w_outer, row, where=f"{where}, weight")
    if w.dim() != 2 or w.shape[1] * row.per_byte != k:
        raise FormatError(
            "the weight does not fit the activations' last axis",
            where=where,
            got=f"weight codes {tuple(w.shape)}",
            expected=f"(N, {k // row.per_byte}), which is K = {k} in {row.name}",
        )
    if bias is not None and (tuple(bias.shape) != (w.shape[0],) or not bias.is_floating_point()):
        raise FormatError(
            "the bias does not fit the weight",
            where=where,
            got=f"{tuple(bias.shape)} {bias.dtype}",
            expected=f"({w.shape[0]},) of a float dtype",
        )


def check_output(dtype: torch.dtype, allowed: tuple[torch.dtype, ...], *, where: str) -> None:
    """Raise a FormatError unless the product can be returned in this dtype."""
    if dtype not in allowed:
        raise FormatError(
            "this product has no such output dtype",
            where=where,
            got=dtype,
            expected=_one_of(allowed),
            hint="Compute in torch.bfloat16 and cast the result (docs/numerics.md sections 4.2 and 4.3).",
        )


def check_float(dtype: torch.dtype, *, where: str) -> None:
    """Raise a FormatError unless values can be decoded to this dtype."""
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if dtype not in floats:
        raise FormatError("values are not decoded to this dtype", where=where, got=dtype, expected=_one_of(floats))


def _one_of(names: tuple[object, ...]) -> str:
    return " or ".join(map(str, names))
