"""MXLinear: the layer that takes the place of ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mxdit.backends import Layout, layout_for
from mxdit.errors import FormatError
from mxdit.numerics.formats import FLOATS, Scheme, block_format, scheme_for
from mxdit.packed import PackedModule
from mxdit.weights import Codes, quantize_weight


class MXLinear(PackedModule, nn.Linear):
    """``y = x @ W.T + b`` with W stored in a microscaling format and x quantized on the fly.

    It is an `nn.Linear`, so that peft puts its adapters beside it (`mxdit.quantize.adapters`), with one difference: the packed
    weight lies in buffers, bytes as uint8. A host that casts or reads a model's floating parameters (diffusers does both)
    leaves it alone. ``state_dict()`` is the canonical layout on every device.
    The weight is frozen; gradients flow to x, as they would through the decoded weight, with the rounding of x taken for the
    identity (straight through), and to a bias that wants one.

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
        smooth: whether activations are multiplied by ``mul_scale`` first (four-bit methods only).

    Buffers are the format's record (`BlockFormat.tensors`): ``weight``, ``weight_scale``, and where the method has them
    ``weight_dual_scale`` and ``mul_scale``. They are uninitialized until `load` is given them; `from_weight` makes them. On a
    device that has a better layout for ``weight`` it lies in that one (`prepack`).

    Raises:
        FormatError: for a method, activation, rule or shape that does not exist.
    """

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
        nn.Module.__init__(self)  # nn.Linear's own would allocate a float weight
        self._layout: Layout | None = None  # of the weight, where it is not the canonical one
        held: Any = {"method": method, "rule": rule, "device": device, "smooth": smooth}
        self._hold(out_features, in_features, **held, where="MXLinear")
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation or ("mxfp8" if block_format(method).bits == 8 else "mxfp4")
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

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
        """The layer that takes the place of a linear.

        Args:
            weight: (N, K), and ``mul_scale`` (K,): see `quantize_weight`.
            bias: (N,) or None; kept in its dtype.

        Raises:
            FormatError: as the constructor and `quantize_weight`.
        """
        parts = quantize_weight(weight, method, rule=rule, mul_scale=mul_scale, where="MXLinear.from_weight")
        n, k = weight.shape
        smooth = mul_scale is not None
        layer = cls(k, n, False, method=method, activation=activation, rule=rule, device="meta", smooth=smooth)
        layer.load(parts)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] - of nn.Linear, where it is a parameter
        """The buffer of that name, as `Codes`: nobody takes it for the float weight of a linear.

        In a layout of its device it is as it is, for no view of it may be made there; and it has another shape than a weight.
        """
        codes = self._buffers.get("weight")
        if codes is None:
            raise AttributeError("weight")
        plain = type(codes) is Tensor and self._layout is None
        return codes.as_subclass(Codes) if plain else codes

    def load(self, parts: Mapping[str, Tensor]) -> None:
        """As `PackedModule.load`; the weight is then brought into its device's layout."""
        super().load(parts)
        if "weight" in parts:
            self._layout = None
            self.prepack()

    @property
    def _codes(self) -> Tensor:
        """The buffer itself, whatever `weight` shows of it."""
        return cast(Tensor, self._buffers["weight"])

    def _canonical(self) -> Tensor:
        return self._codes if self._layout is None else self._layout.unpack(self._codes)

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
        """What the layer computes: ``w4a4``, ``w4a8``, ``w4a16``, ``w8a8`` or ``w8a16``."""
        return self._scheme.name

    @property
    def layout(self) -> str:
        """How the weight lies in memory: ``packed``, or a layout of its device (`mxdit.ops.products.MEMORY_LAYOUTS`)."""
        return "packed" if self._layout is None else self._layout.name

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) bf16, fp16 or fp32 to (..., N) in x's dtype.

        Where the operator gives no fp32 (four- or eight-bit activations over dual-scale weights, and w4a8), fp32
        activations are computed in bf16 and the result is cast back.
        """
        if x.dtype not in self._outputs:
            if x.dtype is not torch.float32:
                raise FormatError(
                    "activations have a dtype that no scheme takes",
                    where="MXLinear",
                    got=x.dtype,
                    expected="torch.bfloat16, torch.float16 or torch.float32",
                )
            return self.forward(x.to(torch.bfloat16)).to(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _StraightThrough.apply(x, self.bias, self)
        return torch.ops.mxdit.linear.default(*self.arguments(x))

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What ``torch.ops.mxdit.linear`` is called with for x, in the order of its schema."""
        held = self._buffers  # not self.weight and so on: nn.Module looks for them in vain elsewhere first
        dual = held["weight_dual_scale"]
        return (
            x,
            held["weight"],
            held["weight_scale"],
            None if dual is None else dual.squeeze(-1),
            held["mul_scale"],
            self.bias,
            self._scheme.name,
            self.rule if self._scheme.activation == "mxfp4" else "ocp",
            self.layout,
        )

    def prepack(self) -> None:
        """Bring the weight into the layout that its device multiplies fastest, where that is not the canonical one.

        Quantizing, loading and moving a layer do so. It takes no second copy, and `state_dict()` stays canonical.
        """
        layout = layout_for(self._codes.device, self.method) if self._layout is None else None
        if layout is not None:
            self._buffers["weight"], self._layout = layout.pack(self._codes), layout

    def _unpack(self) -> None:
        """The inverse of `prepack`."""
        if self._layout is not None:
            self._buffers["weight"], self._layout = self._layout.unpack(self._codes), None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout is not None:
            destination[f"{prefix}weight"] = self._canonical()

    def check_state(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """As `PackedModule.check_state`, and a weight comes with its multipliers."""
        super().check_state(state, prefix)
        if self.mul_scale is not None and f"{prefix}weight" in state and f"{prefix}mul_scale" not in state:
            raise FormatError(
                "the weight comes without the multipliers that it was made under",
                where=f"{prefix}mul_scale",
                expected=self.record["mul_scale"],
                hint="Load both at once, or make the layer without smooth=True.",
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)  # before anything is touched
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.prepack()

    def reset_parameters(self) -> None:
        """Refused: a packed weight has no distribution to be drawn from."""
        raise FormatError(
            "a packed weight cannot be initialized", where="MXLinear", hint="Quantize a weight: MXLinear.from_weight."
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"method={self.method}, scheme={self.scheme}, rule={self.rule}"
            + (", smooth" if self.mul_scale is not None else "")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `PackedModule._apply`; nor is the bias cast to a dtype that is none to compute with: diffusers' layerwise casting
        stores linears in eight bits."""
        self._unpack()  # another device has another layout, or none
        bias = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype not in FLOATS and bias.dtype in FLOATS:
            self.bias.data = bias.to(self.bias.device)
        self.prepack()
        return self


def linears_of(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """(path, linear) of every linear of a model, in its order. Adapters are seen through: a linear that has some is found at
    its own path, and theirs are none of the model's."""
    if isinstance(model, nn.Linear):
        yield path, model
        return
    base = getattr(model, "base_layer", None)  # as every tuner layer of peft calls what it stands beside
    if isinstance(base, nn.Module):
        yield from linears_of(base, path)
        return
    for name, child in model.named_children():
        yield from linears_of(child, f"{path}.{name}" if path else name)


class HostedLinear(MXLinear):
    """The layer in a model of transformers, which looks at the dtype of `weight`.

    T5's and UMT5's feed-forward casts what it gives to `wo` to that dtype unless it is int8, which is how transformers tells
    weights that another library quantized: uint8 would turn activations into bytes. So the codes read as int8. What is
    stored, moved and multiplied is the buffer, uint8 as ever.
    """

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The codes as int8, in the same memory."""
        codes = self._buffers.get("weight")
        if codes is None:
            raise AttributeError("weight")  # nn.Module asks before it registers a buffer of that name
        seen = codes.view(torch.int8)
        if not torch.compiler.is_compiling():
            seen._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]  # or it would draw initial values
        return seen

    def prepack(self) -> None:
        """Nothing: of a device's own layout there is no such view."""


class _StraightThrough(torch.autograd.Function):
    """The layer's product, with the gradient of ``(x * mul_scale) @ decoded.T + bias``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: MXLinear) -> Tensor:
        ctx.layer = layer
        return torch.ops.mxdit.linear.default(*layer.arguments(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), layer = grads, ctx.layer
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            held = layer.packed()
            weight = torch.ops.mxdit.dequantize(held.codes, held.scale, held.outer, held.fmt, grad.dtype)
            to_x = grad @ weight
            if layer.mul_scale is not None:
                to_x = to_x * layer.mul_scale.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(layer.bias.dtype)
        return to_x, to_bias, None
