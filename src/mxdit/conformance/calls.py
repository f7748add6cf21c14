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

# What an argument has rows of, M or N, and how many elements of K one of its columns covers: 0 for codes, whose format says.
_AXES: Mapping[str, tuple[str, int | None]] = {
    "x": ("m", 1),
    "mul_scale": ("", 1),
    "bias": ("n", None),
    **dict.fromkeys(("codes", "a"), ("m", 0)),
    **dict.fromkeys(("scale", "a_scale", "a_l1"), ("m", 32)),
    **dict.fromkeys(("outer", "a_l0"), ("m", 512)),
    "w": ("n", 0),
    **dict.fromkeys(("w_scale", "w_l1"), ("n", 32)),
    **dict.fromkeys(("w_dual", "w_l0"), ("n", 512)),
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
        args = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in self.args.items()}
        return tuple(output.cpu() for output in _tuple(getattr(torch.ops.mxdit, self.op)(**args)))

    def expected(self) -> tuple[Tensor, ...]:
        """What the reference makes of it."""
        with one_thread(), ByReference():
            return _tuple(getattr(torch.ops.mxdit, self.op)(**self.args))

    @property
    def kind(self) -> str:
        """What `mxdit.conformance.acceptance` goes by."""
        if self.op in OUTPUTS:
            return "dual codes" if self.op == "quantize_dual" else "codes"
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
        """The same with activations of two axes."""
        args = {name: arg.reshape(-1, arg.shape[-1]) for name, arg in self._tensors("m").items()}
        return Call(self.op, {**self.args, **args})

    def size(self, axis: str) -> int:
        """M, N (0 where there is none) or K, as ``axis`` is "m", "n" or "k", of a flat call."""
        if axis == "k":
            name, first = next(iter(self._tensors("m").items()))
            return first.shape[1] * (8 // self._code_bits[name] if name in self._code_bits else 1)
        return next((len(arg) for arg in self._tensors(axis).values()), 0)

    def unit(self, axis: str) -> int:
        """Of what M, N or K can only be dropped in multiples: of K, what a scale covers."""
        if axis != "k":
            return 1
        groups = self.op == "quantize_dual" or any(_AXES[name][1] == 512 for name in self._tensors())
        return 512 if groups and self.size("k") > 512 else 32

    def drop(self, axis: str, start: int, stop: int) -> Call:
        """A flat call without M, N or K from ``start`` to ``stop``, both multiples of its unit, or the end."""
        args = dict(self.args)
        for name, arg in self._tensors().items():
            rows, covers = _AXES[name]
            if axis == rows:
                args[name] = torch.cat([arg[:start], arg[stop:]])
            elif axis == "k" and covers is not None and covers < self.size("k"):  # a part of the only group leaves it
                covers = covers or 8 // self._code_bits[name]
                args[name] = torch.cat([arg[..., : start // covers], arg[..., -(-stop // covers) :]], -1)
        return Call(self.op, args)

    @property
    def numbers(self) -> int:
        """How many numbers its arguments hold."""
        return sum(tensor.numel() for tensor in self._tensors().values())

    def _tensors(self, rows: str | None = None) -> dict[str, Tensor]:
        """The tensors among its arguments: those with rows of M, of N, or all."""
        tensors = {name: arg for name, arg in self.args.items() if isinstance(arg, Tensor)}
        return {name: arg for name, arg in tensors.items() if rows in (None, _AXES[name][0])}

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


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
