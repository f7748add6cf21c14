"""The formats and schemes, as data.

A format says how numbers are stored; a scheme says which formats a linear layer multiplies. Adding either is adding a
row. Source: docs/numerics.md sections 1 to 4; the rows `mxfp4` and `mxfp8` follow the OCP Microscaling specification
1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from mxdit.errors import FormatError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor; `dtype` is None where a file has one that no layer of ours takes."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """The info of a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of data; the dtype must be known."""
        assert self.dtype is not None
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Element:
    """A small float: one sign bit, then exponent and mantissa; exponent field 0 holds the subnormals.

    Attributes:
        name: the usual name, such as ``e2m1``.
        bits: storage bits, sign included.
        mantissa: explicit mantissa bits.
        bias: exponent bias.
        emax: exponent of the largest value.
        max: the largest value; larger magnitudes saturate to it.
    """

    name: str
    bits: int
    mantissa: int
    bias: int
    emax: int
    max: float

    def __str__(self) -> str:
        return self.name


E2M1 = Element("e2m1", bits=4, mantissa=1, bias=1, emax=2, max=6.0)
E4M3 = Element("e4m3", bits=8, mantissa=3, bias=7, emax=8, max=448.0)


PARTS = ("weight", "weight_scale", "weight_dual_scale", "mul_scale")
"""Every tensor that a quantized linear can have beside its bias, by its name in modules and files."""


@dataclass(frozen=True)
class BlockFormat:
    """How a tensor is stored: elements, an E8M0 scale per ``block`` of them, and perhaps an fp32 scale per ``outer``.

    Attributes:
        name: registry name, the only thing about a format that crosses an op boundary.
        element: the element's float type.
        block: elements along the last axis that share one E8M0 scale.
        outer: elements along the last axis that share one fp32 scale, or None.
        rules: the scale rules that encoding takes; ``default_rule`` is the one used when none is named.
        round_modes: the rounding modes that encoding takes; the first is the default.
        inputs: the dtypes that encoding takes.
    """

    name: str
    element: Element
    rules: tuple[str, ...]
    default_rule: str
    round_modes: tuple[str, ...]
    inputs: tuple[torch.dtype, ...]
    block: int = 32
    outer: int | None = None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.element.bits

    @property
    def emax(self) -> int:
        """Exponent of the largest element."""
        return self.element.emax

    @property
    def max(self) -> float:
        """The largest element."""
        return self.element.max

    @property
    def per_byte(self) -> int:
        """Codes in one byte of storage."""
        return 8 // self.element.bits

    def blocks(self, k: int) -> int:
        """Number of E8M0 scales of a row of ``k`` elements."""
        return -(-k // self.block)

    def groups(self, k: int) -> int:
        """Number of fp32 outer scales of a row of ``k`` elements; 0 where the format has none."""
        return -(-k // self.outer) if self.outer else 0

    def nbytes(self, rows: int, k: int) -> int:
        """Bytes of a packed (rows, k) tensor, scales included."""
        return rows * sum(info.nbytes for info in self.tensors(1, k).values())

    @property
    def smooths(self) -> bool:
        """Whether a linear of this format can have a `mul_scale`: the four-bit ones can."""
        return self.bits == 4

    def tensors(self, n: int, k: int, *, smooth: bool = False, where: str = "a linear") -> dict[str, TensorInfo]:
        """The record of a quantized linear of K = ``k`` inputs and N = ``n`` outputs: name -> shape and dtype.

        This is what layers hold, files store (docs/format.md) and checks ask for, in this order; the bias is not part of it.

        Args:
            smooth: whether it has a `mul_scale`.
            where: for the error.

        Raises:
            FormatError: this format cannot hold such a weight, or has no `mul_scale`.
        """
        if n <= 0 or k <= 0 or k % self.per_byte:
            raise FormatError(
                f"{self.name} cannot hold a weight of this shape",
                where=where,
                got=f"in_features={k}, out_features={n}",
                expected="positive numbers" + (", in_features even" if self.per_byte == 2 else ""),
            )
        if smooth and not self.smooths:
            raise FormatError(f"{self.name} takes no mul_scale", where=where, hint="Only four-bit weights have one.")
        record = {
            "weight": TensorInfo((n, k // self.per_byte), torch.uint8),
            "weight_scale": TensorInfo((n, self.blocks(k)), torch.uint8),
        }
        if self.outer:
            record["weight_dual_scale"] = TensorInfo((n, self.groups(k), 1), torch.float32)
        if smooth:
            record["mul_scale"] = TensorInfo((k,), torch.float32)
        return record


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What tensors of a float model may be."""
_HALF = (torch.bfloat16, torch.float16)
_MODES = ("rint", "round", "floor")

FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        row.name: row
        for row in (
            BlockFormat("mxfp4", E2M1, ("ocp", "uos", "even6", "even7"), "uos", _MODES, FLOATS),
            BlockFormat("mxfp4_dualscale", E2M1, ("ocp",), "ocp", _MODES, _HALF, outer=512),
            BlockFormat("mxfp8", E4M3, ("ocp", "cublas"), "ocp", ("rint",), FLOATS),
        )
    }
)


@dataclass(frozen=True)
class Scheme:
    """What one linear layer computes.

    Attributes:
        name: ``w4a4`` and so on: bits of the weight, bits of the activation.
        activation: what a user calls the activation's precision (``mxfp4``, ``mxfp8``, ``bf16``).
        weights: the weight formats that the scheme takes, each with the format that the activation is encoded in;
            None means that the activation stays in its own float dtype.
        outputs: the dtypes that the layer's result may have (docs/numerics.md sections 4.1 and 4.2; dual-scale
            weights with four- or eight-bit activations never give fp32, section 4.3).
    """

    name: str
    activation: str
    weights: Mapping[str, str | None] = field(hash=False)
    outputs: tuple[torch.dtype, ...] = FLOATS

    def output_dtypes(self, weight_format: str) -> tuple[torch.dtype, ...]:
        """The dtypes that this scheme can return over weights of that format."""
        activation = self.weights[weight_format]
        return _HALF if activation == "mxfp4_dualscale" else self.outputs


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        row.name: row
        for row in (
            Scheme("w4a4", "mxfp4", {"mxfp4": "mxfp4", "mxfp4_dualscale": "mxfp4_dualscale"}),
            Scheme("w4a8", "mxfp8", {"mxfp4": "mxfp8", "mxfp4_dualscale": "mxfp8"}, _HALF),
            Scheme("w4a16", "bf16", {"mxfp4": None, "mxfp4_dualscale": None}),
            Scheme("w8a8", "mxfp8", {"mxfp8": "mxfp8"}),
            Scheme("w8a16", "bf16", {"mxfp8": None}),
        )
    }
)


def block_format(name: str, *, where: str = "mxdit") -> BlockFormat:
    """The format of that name, or a FormatError that lists the names there are."""
    if name not in FORMATS:
        raise FormatError("unknown format", where=where, got=repr(name), expected=f"one of {', '.join(FORMATS)}")
    return FORMATS[name]


def scheme_for(weight_format: str, activation: str) -> Scheme:
    """The scheme that multiplies weights of that format with activations of that precision, or a FormatError."""
    block_format(weight_format, where="scheme")
    rows = {row.activation: row for row in SCHEMES.values() if weight_format in row.weights}
    if activation not in rows:
        raise FormatError(
            f"no scheme multiplies {weight_format} weights with such activations",
            where="scheme",
            got=f"activation={activation!r}",
            expected=f"one of {', '.join(rows)}",
        )
    return rows[activation]
