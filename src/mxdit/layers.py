"""MXLinear: the layer that takes the place of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.backends import Layout, layout_for
from mxdit.errors import FormatError
from mxdit.numerics.formats import Scheme, block_format, scheme_for

_STAY_FP32 = ("weight_dual_scale", "mul_scale")


class MXLinear(nn.Module):
    """``y = x @ W.T + b`` with W stored in a microscaling format and x quantized on the fly.

    The packed weight lies in buffers, bytes as uint8: a host that casts or reads a model's floating parameters
    (diffusers does both) leaves it alone. ``state_dict()`` is the canonical layout on every device.
    For inference: no gradient flows through it.

    Args:
        in_features: K, even for the four-bit formats.
        out_features: N.
        bias: whether there is a bias, (N,) in ``dtype``.
        method: the weight's format: ``mxfp4``, ``mxfp4_dualscale`` or ``mxfp8``.
        activation: the activation's precision: ``mxfp4``, ``mxfp8`` or ``bf16`` (that is, its own float dtype). It
            may be changed at any time; the weight serves all. None means the method's own: ``mxfp4``, or ``mxfp8``
            for mxfp8.
        rule: the scale rule of the weight and of four-bit activations; None means the format's default. Eight-bit
            activations always use ``ocp``.
        smooth: whether activations are multiplied by ``mul_scale`` first (dual-scale only).

    Buffers (N, K as above): ``weight`` uint8 (N, K/2), mxfp8 (N, K); ``weight_scale`` uint8 (N, ceil(K/32));
    ``weight_dual_scale`` fp32 (N, ceil(K/512), 1) and ``mul_scale`` fp32 (K,) where the method has them. They are
    uninitialized until loaded; `from_weight` fills them. On a device that has a better layout for ``weight`` it lies in
    that one (`prepack`).

    Raises:
        FormatError: for a method, activation, rule or shape that does not exist.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_dual_scale: Tensor | None
    mul_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        method: str,
        activation: str | None = None,
        rule: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        row = block_format(method, where="MXLinear")
        if in_features <= 0 or out_features <= 0 or in_features % row.per_byte:
            raise FormatError(
                f"{method} cannot hold a weight of this shape",
                where="MXLinear",
                got=f"in_features={in_features}, out_features={out_features}",
                expected="positive numbers" + (", in_features even" if row.per_byte == 2 else ""),
            )
        if smooth and not row.outer:
            raise FormatError(f"{method} takes no mul_scale", where="MXLinear", hint="Only mxfp4_dualscale has one.")
        if rule is not None and rule not in row.rules:
            raise FormatError(
                f"{method} has no such scale rule", where="MXLinear", got=repr(rule), expected=" or ".join(row.rules)
            )
        self.in_features, self.out_features, self.method = in_features, out_features, method
        self.rule = rule or row.default_rule
        self._layout: Layout | None = None  # of the weight, where it is not the canonical one
        self.activation = activation or ("mxfp8" if row.bits == 8 else "mxfp4")

        def empty(*shape: int, dtype: torch.dtype | None) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        n, k = out_features, in_features
        self.register_buffer("weight", empty(n, k // row.per_byte, dtype=torch.uint8))
        self.register_buffer("weight_scale", empty(n, row.blocks(k), dtype=torch.uint8))
        self.register_buffer(
            "weight_dual_scale", empty(n, row.groups(k), 1, dtype=torch.float32) if row.outer else None
        )
        self.register_buffer("mul_scale", empty(k, dtype=torch.float32) if smooth else None)
        self.bias = nn.Parameter(empty(n, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        *,
        method: str,
        activation: str | None = None,
        rule: str | None = None,
        mul_scale: Tensor | None = None,
    ) -> MXLinear:
        """Quantize a weight.

        Args:
            weight: (N, K) bf16, fp16 or fp32, on any device; with ``mul_scale`` it must already hold the inverse, for
                the layer computes ``Q(x * mul_scale) @ Q(weight).T``. The dual-scale operator takes no fp32: such a
                weight is rounded to bf16 first.
            bias: (N,) or None; kept in its dtype.
            mul_scale: (K,), finite and positive; rounded to bf16, which is what devices multiply by.

        Raises:
            FormatError: as the constructor, and for a weight or mul_scale that cannot be quantized.
        """
        if weight.dim() != 2:
            raise FormatError(
                "a weight has two axes",
                where="MXLinear.from_weight",
                got=f"shape {tuple(weight.shape)}",
                expected="(N, K)",
            )
        n, k = weight.shape
        layer = cls(
            k, n, False, method=method, activation=activation, rule=rule, device="meta", smooth=mul_scale is not None
        )
        weight = weight.detach()
        if layer.weight_dual_scale is None:
            layer.weight, layer.weight_scale = torch.ops.mxdit.quantize(weight, method, layer.rule, "rint")
        else:
            half = weight.to(torch.bfloat16) if weight.dtype is torch.float32 else weight
            layer.weight, l0, layer.weight_scale = torch.ops.mxdit.quantize_dual(half, None, "rint")
            layer.weight_dual_scale = l0.unsqueeze(-1)
        if not weight.is_meta and bool((layer.weight_scale == 0xFF).any()):
            broken = int((~torch.isfinite(weight)).sum())
            raise FormatError(
                f"the weight holds what {method} cannot",
                where="MXLinear.from_weight",
                got=f"{broken} infs or NaNs"
                if broken
                else "a group of 512 whose largest magnitude is below 6 * 2**-126",
                expected="finite numbers, zeros included",
                hint="The checkpoint is damaged, or overflowed when it was cast: take it in BF16 or FP32.",
            )
        if mul_scale is not None:
            layer.mul_scale = _bf16_multipliers(mul_scale, k).to(weight.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer.prepack()
        return layer

    @property
    def activation(self) -> str:
        """The activation's precision: ``mxfp4``, ``mxfp8`` or ``bf16``."""
        return self._scheme.activation

    @activation.setter
    def activation(self, activation: str) -> None:
        self._scheme: Scheme = scheme_for(self.method, activation)
        self._outputs = self._scheme.output_dtypes(self.method)

    @property
    def scheme(self) -> str:
        """What the layer computes: ``w4a4``, ``w4a8``, ``w4a16`` or ``w8a8``."""
        return self._scheme.name

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) bf16, fp16 or fp32 to (..., N) in x's dtype.

        Where the operator gives no fp32 (four- or eight-bit activations over dual-scale weights, and w4a8), fp32
        activations are computed in bf16 and the result is cast back.
        """
        if x.dtype in self._outputs:
            return self._linear(x)
        if x.dtype is not torch.float32:
            raise FormatError(
                "activations have a dtype that no scheme takes",
                where="MXLinear",
                got=x.dtype,
                expected="torch.bfloat16, torch.float16 or torch.float32",
            )
        return self._linear(x.to(torch.bfloat16)).to(x.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        held = self._buffers  # not self.weight and so on: nn.Module looks for them in vain elsewhere first
        dual = held["weight_dual_scale"]
        return torch.ops.mxdit.linear.default(
            x,
            held["weight"],
            held["weight_scale"],
            None if dual is None else dual.squeeze(-1),
            held["mul_scale"],
            self.bias,
            self._scheme.name,
            self.rule if self._scheme.activation == "mxfp4" else "ocp",
            "packed" if self._layout is None else self._layout.name,
        )

    def prepack(self) -> None:
        """Bring the weight into the layout that its device multiplies fastest, where that is not the canonical one.

        Quantizing, loading and moving a layer do so. It takes no second copy, and `state_dict()` stays canonical.
        """
        layout = layout_for(self.weight.device, self.method) if self._layout is None else None
        if layout is not None:
            self.weight, self._layout = layout.pack(self.weight), layout

    def _unpack(self) -> None:
        """The inverse of `prepack`."""
        if self._layout is not None:
            self.weight, self._layout = self._layout.unpack(self.weight), None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout is not None:
            destination[f"{prefix}weight"] = self._layout.unpack(self.weight)

    def check_state(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Raise FormatError unless what a state_dict holds for this layer is of its very shapes and dtypes.

        `nn.Module` would cast floats to codes, and leave out multipliers that one of the two sides does not have.
        """
        row = block_format(self.method)
        own = {name: (tuple(held.shape), held.dtype) for name, held in self._buffers.items() if held is not None}
        own["weight"] = ((self.out_features, self.in_features // row.per_byte), torch.uint8)  # in any layout
        for name in self._buffers:
            part = state.get(prefix + name)
            if part is not None and (tuple(part.shape), part.dtype) != own.get(name):
                raise FormatError(
                    f"not a tensor of this {self.method} layer",
                    where=prefix + name,
                    got=f"{tuple(part.shape)} {part.dtype}",
                    expected="{} {}".format(*own[name]) if name in own else "none",
                    hint="Loading does not quantize: load floats into the float model, and quantize that.",
                )
        if self.mul_scale is not None and f"{prefix}weight" in state and f"{prefix}mul_scale" not in state:
            raise FormatError(
                "the weight comes without the multipliers that it was made under",
                where=f"{prefix}mul_scale",
                expected=f"({self.in_features},) torch.float32",
                hint="Load both at once, or make the layer without smooth=True.",
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.prepack()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"method={self.method}, scheme={self.scheme}, rule={self.rule}"
            + (", smooth" if self.mul_scale is not None else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MXLinear:
        """``nn.Module._apply``, which serves every move and cast; the fp32 scales are moved but never cast."""
        self._unpack()  # another device has another layout, or none
        before = {name: self._buffers[name] for name in _STAY_FP32}
        super()._apply(fn, recurse)
        for name, kept in before.items():
            moved = self._buffers[name]
            if kept is not None and moved is not None and moved.dtype is not kept.dtype:
                self._buffers[name] = kept.to(moved.device)
        self.prepack()
        return self


def _bf16_multipliers(mul_scale: Tensor, k: int) -> Tensor:
    """(K,) fp32 that hold bf16 values, or a FormatError where they would not all be finite and positive."""
    if tuple(mul_scale.shape) != (k,):
        raise FormatError(
            "mul_scale does not fit the weight",
            where="MXLinear.from_weight",
            got=f"shape {tuple(mul_scale.shape)}",
            expected=f"({k},)",
        )
    rounded = mul_scale.detach().to(torch.bfloat16).float()
    good = torch.isfinite(rounded) & (rounded > 0)
    if not bool(good.all()):
        first = int((~good).nonzero()[0])
        raise FormatError(
            "mul_scale must be finite and positive in bf16",
            where="MXLinear.from_weight",
            got=f"{float(mul_scale[first])} at channel {first}",
            hint="A zero or overflowing multiplier comes from a dead or broken channel in the calibration.",
        )
    return rounded
