"""A float weight as the tensors of a quantized linear."""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.errors import FormatError
from mxdit.numerics.checks import bf16_mul_scale, check_mul_scale
from mxdit.numerics.formats import block_format


def quantize_weight(
    weight: Tensor, method: str, *, rule: str | None = None, mul_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that stand for a weight in `method`, by their names in `BlockFormat.tensors`, in canonical form.

    Args:
        weight: (N, K) bf16, fp16 or fp32, on any device, which is where the result is; with `mul_scale` it must already hold
            the inverse. The dual-scale operator takes no fp32: such a weight is rounded to bf16 first.
        method: "mxfp4", "mxfp4_dualscale" or "mxfp8".
        rule: the scale rule; None means the format's default.
        mul_scale: (K,), finite and positive; rounded to bf16, which is what devices multiply by.

    Raises FormatError for a weight or mul_scale that cannot be quantized.
    """
    where = "quantize_weight"
    row = block_format(method, where=where)
    if weight.dim() != 2:
        raise FormatError("a weight has two axes", where=where, got=f"shape {tuple(weight.shape)}", expected="(N, K)")
    n, k = weight.shape
    record = row.tensors(n, k, smooth=mul_scale is not None, where=where)
    weight, outer = weight.detach(), None
    if row.outer:
        half = weight.to(torch.bfloat16) if weight.dtype is torch.float32 else weight
        codes, outer, scale = torch.ops.mxdit.quantize_dual(half, None, "rint")
        outer = outer.unsqueeze(-1)
    else:
        codes, scale = torch.ops.mxdit.quantize(weight, method, rule or row.default_rule, "rint")
    if not weight.is_meta and bool((scale == 0xFF).any()):
        broken = int((~torch.isfinite(weight)).sum())
        raise FormatError(
            f"the weight holds what {method} cannot",
            where=where,
            got=f"{broken} infs or NaNs" if broken else "a group of 512 whose largest magnitude is below 6 * 2**-126",
            expected="finite numbers, zeros included",
            hint="The checkpoint is damaged, or overflowed when it was cast: take it in BF16 or FP32.",
        )
    made = {"weight": codes, "weight_scale": scale, "weight_dual_scale": outer}
    if mul_scale is not None:
        check_mul_scale(mul_scale, k, row, where=where)
        made["mul_scale"] = bf16_mul_scale(mul_scale, where=where).to(weight.device)
    return {name: tensor for name, tensor in made.items() if name in record and tensor is not None}
