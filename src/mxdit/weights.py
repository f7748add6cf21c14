"""Quantizing one weight: a float tensor to the tensors of a quantized linear, on any device, with no module in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxdit.backends import import_backend_of
from mxdit.errors import FormatError
from mxdit.numerics.checks import bf16_mul_scale, check_mul_scale
from mxdit.numerics.codec import Packed, Scales, encode
from mxdit.numerics.formats import BlockFormat, block_format


def quantize_weight(
    weight: Tensor,
    method: str,
    *,
    rule: str | None = None,
    mul_scale: Tensor | None = None,
    scales: Scales | None = None,
    where: str = "quantize_weight",
) -> dict[str, Tensor]:
    """The tensors of the linear that multiplies by ``weight``: the record of its format, in canonical layout.

    Args:
        weight: (N, K) bf16, fp16 or fp32, on any device. With ``mul_scale`` it must already hold the inverse, for the layer
            computes ``Q(x * mul_scale) @ Q(weight).T``. The dual-scale operator takes no fp32: such a weight is rounded to
            bf16 first.
        method: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``.
        rule: the rule that scales are chosen by; None means the format's default.
        mul_scale: (K,), finite and positive, for four-bit methods; rounded to bf16, which is what devices multiply by.
        scales: the scales to round under instead of choosing them, as `mxdit.encode` takes them.
        where: for errors.

    Returns:
        name -> tensor on the weight's device, as `BlockFormat.tensors` lists them. A dual-scale group of 512 whose largest
        magnitude is below 6 * 2**-126, where its outer scale would underflow, is stored as zeros.

    Raises:
        FormatError: the shapes or dtypes do not fit, or the weight holds an inf or a NaN.
    """
    row = block_format(method, where=where)
    if weight.dim() != 2:
        raise FormatError("a weight has two axes", where=where, got=f"shape {tuple(weight.shape)}", expected="(N, K)")
    n, k = weight.shape
    record = row.tensors(n, k, smooth=mul_scale is not None, where=where)
    if mul_scale is not None:
        check_mul_scale(mul_scale, k, row, where=where)
    weight = weight.detach()
    if row.outer and weight.dtype is torch.float32:
        weight = weight.to(torch.bfloat16)
    import_backend_of(weight.device)
    packed = _packed(weight, row, rule, scales)
    if not weight.is_meta and bool((packed.scale == 0xFF).any()):
        packed = _packed(_finite(weight, packed, scales, where), row, rule, scales)
    outer = None if packed.outer is None else packed.outer.unsqueeze(-1)
    factors = None if mul_scale is None else bf16_mul_scale(mul_scale, where=where).to(weight.device)
    parts = {"weight": packed.codes, "weight_scale": packed.scale, "weight_dual_scale": outer, "mul_scale": factors}
    return {name: part for name in record if (part := parts[name]) is not None}


def _packed(weight: Tensor, row: BlockFormat, rule: str | None, scales: Scales | None) -> Packed:
    if scales is not None:
        return encode(weight, row.name, rule, scales=scales)
    if row.outer:
        codes, outer, scale = torch.ops.mxdit.quantize_dual(weight, None, "rint")
        return Packed(codes, scale, outer, row.name)
    codes, scale = torch.ops.mxdit.quantize(weight, row.name, rule or row.default_rule, "rint")
    return Packed(codes, scale, None, row.name)


def _finite(weight: Tensor, packed: Packed, scales: Scales | None, where: str) -> Tensor:
    """The weight with zeros in the groups whose outer scale underflows; FormatError for other causes of a NaN block."""
    broken = int((~torch.isfinite(weight)).sum())
    if broken or scales is not None:
        raise FormatError(
            f"the weight holds what {packed.fmt} cannot" if broken else "the given scales do not hold the weight",
            where=where,
            got=f"{broken} infs or NaNs" if broken else f"no number in {int((packed.scale == 0xFF).sum())} blocks",
            expected="finite numbers, zeros included"
            if broken
            else "no byte 0xFF, and outer scales that no quotient overflows",
            hint="The checkpoint is damaged, or overflowed when it was cast: take it in BF16 or FP32."
            if broken
            else None,
        )
    lost = (packed.scale == 0xFF).repeat_interleave(packed.format.block, -1)[:, : weight.shape[1]]
    return weight.masked_fill(lost, 0.0)


NOT_FUSED = (
    "Keep an adapter beside the packed weight, as it is; or fuse it into the model in BF16 and quantize that: "
    "`mxdit quantize SRC DST --lora transformer=FILE[:scale]`."
)
NOT_FLOATS = f"{NOT_FUSED} Where a pipeline widens layers before it loads one (FLUX.1), call mxdit.load_lora_weights."


class Codes(Tensor):
    """The packed weight as others see it: a tensor of bytes that is not to be read, added to or replaced as a linear's floats.

    Libraries that know `nn.Linear` do so to its ``weight.data`` (peft merges adapters into it, diffusers fuses projections and
    widens layers), or cast it (DoRA). Everything else goes through, and gives plain tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        if func in _OF_FLOATS or (func in _CASTS and made.is_floating_point()):
            raise FormatError("a packed weight is taken for a float one", where="MXLinear.weight", hint=NOT_FLOATS)
        return made


_OF_FLOATS = {Tensor.data.__get__, Tensor.data.__set__}  # pyright: ignore[reportAttributeAccessIssue]
_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as}
