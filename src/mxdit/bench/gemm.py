"""``mxdit bench gemm``: Wan2.2's matrix products by torch and by every method, quantizing and multiplying apart and together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mxdit.backends import REFERENCE, Backend, backends
from mxdit.bench.modes import CARRIERS, MODES, baseline
from mxdit.bench.products import Product
from mxdit.bench.timing import Call, Times, alternate, rotated, timer
from mxdit.conformance import calls
from mxdit.conformance.acceptance import acceptance
from mxdit.conformance.compare import bound, compare_values
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FORMATS

QUANTIZE, MATMUL, WHOLE = PARTS = ("quantize", "matmul", "whole")
SAMPLE, COLUMNS = 8, 512  # rows and columns of a result that are checked
# Operations: a larger product takes the reference seconds a round, and gigabytes in fp32.
REFERENCE_LIMIT = {"cpu": 2e8}
REFERENCE_LIMIT_ELSEWHERE = 1e12


@dataclass(frozen=True)
class Part:
    """A measured step of one method.

    Attributes:
        times: seconds.
        nbytes: what has to move at least once: operands that are read and results that are written.
        operations: floating-point operations, 0 for quantizing.
    """

    times: Times
    nbytes: int
    operations: int

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON, with bytes and operations a second at the median."""
        median = self.times.median
        rates = {"bytes_per_second": self.nbytes / median, "operations_per_second": self.operations / median}
        return {**asdict(self.times), "bytes": self.nbytes, "operations": self.operations, **rates}


@dataclass(frozen=True)
class Row:
    """One method on one product by one implementation.

    Attributes:
        product: what is multiplied.
        method: of `MODES`, or what `baseline` names, "bf16" or "fp32": torch's own linear.
        backend: what `mxdit info` calls the implementation, or "torch".
        parts: by name; those that the ops cannot take apart are missing.
        ratio: median of torch's own linear over that of the whole, in the same rounds: above 1 is faster.
        right: whether sampled results are what docs/numerics.md section 8 grants this device; None for torch's own.
        note: why nothing was measured, empty where it was.
    """

    product: Product
    method: str
    backend: str
    parts: dict[str, Part]
    ratio: float | None = None
    right: bool | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        return {
            **{key: getattr(self, key) for key in ("method", "backend", "ratio", "right", "note")},
            "parts": parts,
        } | {"product": asdict(self.product)}


# -- what is measured ----------------------------------------------------------------------------------------------------


class Linear:
    """One (K, N) linear on a device and what mxdit makes of it, in copies that take turns (`rotated`)."""

    def __init__(self, k: int, n: int, device: torch.device) -> None:
        source = nn.Linear(k, n, device="meta", dtype=torch.bfloat16)  # its own first numbers would take seconds
        for name, shape, spread in (("weight", (n, k), 0.02), ("bias", (n,), 1.0)):
            values = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=spread)
            setattr(source, name, nn.Parameter(values, requires_grad=False))
        self.k, self.n, self.device, self._packed = k, n, device, {}
        self.baseline = baseline(str(device))
        self.plain: list[Any] = rotated(source.to(CARRIERS[self.baseline]))

    def mode(self, name: str) -> list[MXLinear]:
        """The copies in that mode; those that differ in the activation only share their weights."""
        method, activation = MODES[name]
        if method not in self._packed:
            weight, bias = (tensor.bfloat16() for tensor in (self.plain[0].weight, self.plain[0].bias))
            first = MXLinear.from_weight(weight, bias, method=method)
            self._packed[method] = rotated(first)
        layers = [copy.copy(layer) for layer in self._packed[method]]
        for layer in layers:
            layer.activation = activation
        return layers


def steps(layers: Sequence[MXLinear], x: Tensor) -> dict[str, list[Call]]:
    """Calls of the ops over copies of one layer: the whole linear, and quantizing and multiplying apart where there are ops
    that do either.

    There are none for activations that stay floats, nor for a weight in a device's own layout, which only ``linear`` reads.
    """
    ops, first = torch.ops.mxdit, layers[0]
    found: dict[str, list[Call]] = {WHOLE: [partial(ops.linear, *layer.arguments(x)) for layer in layers]}
    dual, own = first.weight_dual_scale is not None, first.activation == "mxfp4"
    if first.activation == "bf16" or first.layout != "packed" or (dual and not own):
        return found
    weights = [(layer.packed(), layer.bias) for layer in layers]
    if dual:
        encode = partial(ops.quantize_dual, x, None, "rint")
        codes, l0, l1 = encode()
        products: list[Call] = [
            partial(ops.matmul_dual, codes, w.codes, l0, w.outer, l1, w.scale, bias, x.dtype) for w, bias in weights
        ]
    else:
        fmt = first.activation
        encode = partial(ops.quantize, x, fmt, first.rule if own else "ocp", "rint")
        packed, rest = encode(), (fmt, first.method, x.dtype)
        products = [partial(ops.matmul, *packed, w.codes, w.scale, bias, *rest) for w, bias in weights]
    return {QUANTIZE: [encode], MATMUL: products, **found}


def is_right(layer: MXLinear, got: Tensor, x: Tensor) -> bool:
    """Whether sampled rows and columns of ``got`` are the reference's results for x, as far as `acceptance` demands it of the
    device: bit for bit for four-bit products on a CPU or GPU.

    Args:
        layer: with its weight in the canonical layout on a CPU, or on a device in any.
        got: (M, N), what the layer made of x (M, K).
    """
    rows, columns = _spread(SAMPLE, len(x)), _spread(COLUMNS, layer.out_features)
    held = dict(calls.Call.of_layer(layer, x[rows.to(x.device)]).args)
    for key in ("w", "w_scale", "w_dual", "bias"):
        held[key] = None if held[key] is None else held[key][columns]
    call = calls.Call("linear", held)
    (expected,) = call.expected()
    accepted = acceptance(call.kind, x.device.type)
    sample = got[rows.to(x.device)][:, columns.to(x.device)].cpu()
    return compare_values(sample, expected, lambda: bound(call, expected, accepted)).accepted(accepted)


def _spread(count: int, of: int) -> Tensor:
    """Indices of that many rows, first and last included."""
    return torch.linspace(0, of - 1, min(count, of)).long()


# -- measuring -----------------------------------------------------------------------------------------------------------


def usable(device: torch.device) -> list[Backend]:
    """The implementations that can answer on that device, the reference last."""
    return [b for b in backends() if b.device in (device.type, "any") and b.why_not() is None]


@torch.inference_mode()
def run(wanted: Sequence[Product], methods: Sequence[str], device: torch.device, rounds: int) -> Iterator[list[Row]]:
    """Measure one product after the other, and yield its rows: torch's own first, then every method by every implementation.

    Torch's own linear is in the type that `baseline` names; the others have BF16 activations and results. In each round every
    call of a product is made once. Inputs are Gaussian; results are checked in the same run.
    """
    linear: Linear | None = None
    for product in sorted(wanted, key=lambda product: (product.k, product.n)):
        if linear is None or (linear.k, linear.n) != (product.k, product.n):
            linear = None  # the last one's weights go before the next one's come
            linear = Linear(product.k, product.n, device)
        yield _measure(product, linear, methods, rounds)


def _measure(product: Product, linear: Linear, methods: Sequence[str], rounds: int) -> list[Row]:
    device, plain = linear.device, linear.plain[0]
    x = torch.randn(product.m, product.k, device=device).bfloat16()
    own = x.to(plain.weight.dtype)
    moved = own.nbytes + plain.weight.nbytes + _bias(plain) + own.itemsize * product.m * product.n
    by_torch: list[Call] = [partial(F.linear, own, one.weight, one.bias) for one in linear.plain]
    rows = [Row(product, linear.baseline, "torch", {}, 1.0)]
    for backend in usable(device):
        # Rounds of its own for each implementation, with torch's in them: the reference's large copies disturb what comes next.
        work, first = [(rows[0], WHOLE, moved, by_torch)], len(rows)
        for method in methods:
            row, layers = Row(product, method, backend.name, {}), linear.mode(method)
            refused = _refused(backend, layers[0], product)
            if refused is None:
                with _answering(backend):
                    taken = steps(layers, x)
                    got: Any = taken[WHOLE][0]()
                row = replace(row, right=is_right(layers[0], got, x))
                for part in (WHOLE,) if backend is REFERENCE else PARTS:
                    if part in taken:
                        copies = [_by(backend, call) for call in taken[part]]
                        work.append((row, part, _moved(layers[0], x, part), copies))
            rows.append(replace(row, note=refused or ""))
        if len(work) == 1:
            continue
        times = alternate([copies for *_, copies in work], rounds, timer(device))
        for (row, part, nbytes, _), seconds in zip(work, times, strict=True):
            if not (row is rows[0] and row.parts):  # torch's row holds what it took beside the first implementation
                row.parts[part] = Part(Times.of(seconds), nbytes, 0 if part == QUANTIZE else product.operations)
        reached = Times.of(times[0]).median
        rows[first:] = [
            replace(row, ratio=reached / row.parts[WHOLE].times.median) if row.parts else row for row in rows[first:]
        ]
    return rows


def _refused(backend: Backend, layer: MXLinear, product: Product) -> str | None:
    """Why that implementation is not measured on a product, or None."""
    if backend is REFERENCE:
        if product.operations > REFERENCE_LIMIT.get(layer.weight.device.type, REFERENCE_LIMIT_ELSEWHERE):
            return "too large for the reference, which would take seconds a round"
        if layer.layout != "packed":
            return f"its weight lies in the device's own layout, {layer.layout}"
    return backend.rejects(layer.scheme, product.k, product.n)


def _answering(backend: Backend) -> AbstractContextManager[object]:
    return calls.ByReference() if backend is REFERENCE else nullcontext()


def _by(backend: Backend, call: Call) -> Call:
    if backend is not REFERENCE:
        return call

    def by_reference() -> object:
        with calls.ByReference():
            return call()

    return by_reference


def _moved(layer: MXLinear, x: Tensor, part: str) -> int:
    """Bytes that have to move at least once: operands read and results written, none of them twice."""
    m, k = x.shape
    codes = 0 if layer.activation == "bf16" else FORMATS[_activation_format(layer)].nbytes(m, k)
    if part == QUANTIZE:
        return x.nbytes + codes
    weight = FORMATS[layer.method].nbytes(layer.out_features, k) + _bias(layer)
    return (codes if part == MATMUL else x.nbytes) + weight + 2 * m * layer.out_features


def _activation_format(layer: MXLinear) -> str:
    return layer.method if layer.activation == "mxfp4" else layer.activation


def _bias(layer: Any) -> int:
    return 0 if layer.bias is None else layer.bias.nbytes
