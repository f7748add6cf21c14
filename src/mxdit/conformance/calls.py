"""`Call`: one op with its arguments, run on a device or by the reference, and cut to a part of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mxdit import ops
from mxdit.backends.environment import one_thread
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FORMATS, SCHEMES, BlockFormat

OUTPUTS = {"quantize": ("codes", "scale"), "quantize_dual": ("codes", "l0", "l1")}  # all others have one: "out"

# Which axis of a problem is which dimension of an argument, where activations of products have two: M, N and K; of attention
# batch, queries, keys, and the widths of k and v; of norms batch, tokens and K.
_PRODUCT: Mapping[str, Mapping[str, int]] = {
    **{name: {"m": 0, "k": 1} for name in ("x", "codes", "scale", "outer", "a", "a_scale", "a_l0", "a_l1")},
    **{name: {"n": 0, "k": 1} for name in ("w", "w_scale", "w_dual", "w_l0", "w_l1")},
    "mul_scale": {"k": 0},
    "bias": {"n": 0},
}
_NORM = {"x": {"b": 0, "l": 1, "k": -1}, "weight": {"k": 0}, "cos": {"l": 0}, "sin": {"l": 0}}
_ATTENTION = {
    "q": {"b": 0, "l": 1, "d": 3},
    "k": {"b": 0, "s": 1, "d": 3},
    "v": {"b": 0, "s": 1, "e": 3},
    "mask": {"b": -4, "l": -2, "s": -1},
}
_DIMENSIONS: Mapping[str, Mapping[str, Mapping[str, int]]] = {  # of ops that are no products
    "attention": _ATTENTION,
    "rms_norm": _NORM,
    "rms_norm_": _NORM,
    "gelu_": {"x": {"m": 0}},
}
_COVERS = {  # how many elements of K one column covers, where it is not one: 0 for codes, whose format says
    **dict.fromkeys(("codes", "a", "w"), 0),
    **dict.fromkeys(("scale", "a_scale", "a_l1", "w_scale", "w_l1"), 32),
    **dict.fromkeys(("outer", "a_l0", "w_dual", "w_l0"), 512),
}
_IMPLEMENTATIONS = {
    func: op.reference
    for op in ops.OPS.values()
    for packet in (getattr(torch.ops.mxdit, op.name),)
    for func in (packet, packet.default)
}


class ByReference(TorchFunctionMode):
    """While it is on, the reference answers ``torch.ops.mxdit``, whatever kernels the tensors' device has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _IMPLEMENTATIONS:
            return func(*args, **(kwargs or {}))
        with self:  # for the ops that an op calls
            return _IMPLEMENTATIONS[func](*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class Call:
    """A call of ``torch.ops.mxdit``.

    Attributes:
        op: the op's name.
        args: its arguments by name, in their order; tensors on the CPU, activations in any number of axes.
    """

    op: str
    args: Mapping[str, Any]

    @classmethod
    def of_layer(cls, layer: MXLinear, x: Tensor) -> Call:
        """What a layer computes of x (..., K), with its weight as it is on its device, in canonical layout."""
        names = [argument.name for argument in torch.ops.mxdit.linear.default._schema.arguments]
        args = dict(zip(names, layer.arguments(x), strict=True)) | {"w": layer.packed().codes, "layout": "packed"}
        return cls("linear", {name: arg.cpu() if isinstance(arg, Tensor) else arg for name, arg in args.items()})

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it returns."""
        return OUTPUTS.get(self.op, ("out",))

    def on(self, device: str) -> tuple[Tensor, ...]:
        """What the device makes of it, brought back to the CPU."""
        return tuple(output.cpu() for output in self._answer(device))

    def expected(self) -> tuple[Tensor, ...]:
        """What the reference makes of it."""
        with one_thread(), ByReference():
            return self._answer("cpu")

    def _answer(self, device: str) -> tuple[Tensor, ...]:
        args = {
            name: arg.to(device, copy=self.in_place) if isinstance(arg, Tensor) else arg
            for name, arg in self.args.items()
        }
        outputs = getattr(torch.ops.mxdit, self.op)(**args)
        if self.in_place:
            return (args["x"],)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @property
    def in_place(self) -> bool:
        """Whether its result is in x afterwards."""
        return self.op.endswith("_")

    @property
    def signed_zeros(self) -> bool:
        """Whether the sign of a zero in its result is defined."""
        return self.op in ("dequantize", "rms_norm", "rms_norm_", "gelu_")

    @property
    def kind(self) -> str:
        """What `mxdit.conformance.acceptance` goes by."""
        if self.op in OUTPUTS:
            return "dual codes" if self.op == "quantize_dual" else "codes"
        if self.op == "attention":
            return "attention" if self.args["method"] == "exact" else f"{self.args['method']} attention"
        if self.op in _DIMENSIONS:
            return "norm" if self.op.startswith("rms_norm") else "gelu"
        if self.op == "dequantize":
            return "values"
        if self.op == "matmul_dual":
            return "dual product"
        if self.op == "linear":
            weight = ops.products.weight_format(self.args["w_dual"], self.args["scheme"]).name
            activation, result = SCHEMES[self.args["scheme"]].weights[weight], self.args["x"].dtype
        else:
            weight, activation, result = self.args["w_fmt"], self.args["a_fmt"], self.args["out"]
        if activation == "mxfp4":
            bias = "" if self.args["bias"] is None else " + bias"
            return f"product{bias}{' in fp32' if bias and result is torch.float32 else ''}"
        if activation == "mxfp8" and weight != "mxfp8" and result is torch.float16:
            return "w4a8 product in fp16"
        return {None: "float product", "mxfp8": "fp8 product", "mxfp4_dualscale": "dual linear"}[activation]

    @property
    def _code_bits(self) -> dict[str, int]:
        """Bits of the codes in its arguments."""
        if self.op == "dequantize":
            return {"codes": FORMATS[self.args["fmt"]].bits}
        if self.op == "matmul":
            return {"a": FORMATS[self.args["a_fmt"]].bits, "w": FORMATS[self.args["w_fmt"]].bits}
        if self.op == "linear":
            return {"w": ops.products.weight_format(self.args["w_dual"], self.args["scheme"]).bits}
        return {"a": 4, "w": 4} if self.op == "matmul_dual" else {}

    def unsigned(self) -> Call:
        """A product of magnitudes: no number in it has a sign, so its result is the sum of magnitudes."""
        args = dict(self.args)
        for name, arg in args.items():
            if name in self._code_bits:
                args[name] = arg & (0x77 if self._code_bits[name] == 4 else 0x7F)
            elif isinstance(arg, Tensor) and arg.is_floating_point():
                args[name] = arg.abs()
        return Call(self.op, args)

    def flat(self) -> Call:
        """The same with as many axes as `size` and `drop` know."""
        args = dict(self.args)
        if self.op == "gelu_":
            args["x"] = args["x"].flatten()
        elif self.op in ("rms_norm", "rms_norm_") and args["cos"] is None:
            args["x"] = args["x"].reshape(1, -1, args["x"].shape[-1])
        elif self.op not in _DIMENSIONS:
            for name, arg in self._tensors.items():
                if "m" in self._dimensions[name]:
                    args[name] = arg.reshape(-1, arg.shape[-1])
        return Call(self.op, args)

    @property
    def axes(self) -> tuple[str, ...]:
        """What can be dropped of a flat call, in the order that is best: sums last."""
        there = {axis for name in self._tensors for axis in self._dimensions[name]}
        return tuple(axis for axis in "blsmndek" if axis in there)

    def size(self, axis: str) -> int:
        """How long an axis of a flat call is: of K in elements."""
        name, first = next((name, arg) for name, arg in self._tensors.items() if axis in self._dimensions[name])
        return first.shape[self._dimensions[name][axis]] * self._per_column(name, axis)

    def unit(self, axis: str) -> int:
        """Of what an axis can only be dropped in multiples: of K, what a scale covers, or what is turned by itself."""
        if axis != "k":
            return 1
        if self.op in _DIMENSIONS:
            return 1 if self.args["cos"] is None else self.args["cos"].shape[-1]
        groups = self.op == "quantize_dual" or any(_COVERS.get(name) == 512 for name in self._tensors)
        return 512 if groups and self.size("k") > 512 else 32

    def drop(self, axis: str, start: int, stop: int) -> Call:
        """A flat call without what is from ``start`` to ``stop`` of an axis, both multiples of its unit, or the end."""
        args, size = dict(self.args), self.size(axis)
        for name, arg in self._tensors.items():
            dim, covers = self._dimensions[name].get(axis), self._per_column(name, axis)
            if dim is None or dim < -arg.dim() or (arg.shape[dim] == 1 and size > 1):
                continue  # it has no such axis, or one for all: a mask's, or the only group of K
            before, after = start // covers, -(-stop // covers)
            args[name] = torch.cat([arg.narrow(dim, 0, before), arg.narrow(dim, after, arg.shape[dim] - after)], dim)
        return Call(self.op, args)

    def _per_column(self, name: str, axis: str) -> int:
        """How many elements of an axis one number of an argument stands for."""
        return (_COVERS.get(name, 1) or 8 // self._code_bits[name]) if axis == "k" else 1

    @property
    def _dimensions(self) -> Mapping[str, Mapping[str, int]]:
        return _DIMENSIONS.get(self.op, _PRODUCT)

    @property
    def numbers(self) -> int:
        """How many numbers its arguments hold."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: arg for name, arg in self.args.items() if isinstance(arg, Tensor)}

    def without(self, name: str, start: int, stop: int) -> Call:
        """The same with zeros in place of some numbers or codes of an argument, counted through its rows."""
        flat = self.args[name].flatten()
        flat = torch.cat([flat[:start], torch.zeros_like(flat[start:stop]), flat[stop:]])
        return Call(self.op, {**self.args, name: flat.view_as(self.args[name])})


def quantizing(x: Tensor, row: BlockFormat, rule: str, round_mode: str, mul_scale: Tensor | None = None) -> Call:
    """The call that encodes x in this format."""
    if row.outer:
        return Call("quantize_dual", {"x": x, "mul_scale": mul_scale, "round_mode": round_mode})
    return Call("quantize", {"x": x, "fmt": row.name, "rule": rule, "round_mode": round_mode})
