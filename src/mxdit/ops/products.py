"""The ops that multiply: ``matmul``, ``matmul_dual``, ``linear``.

A function that is named like an op is its reference; ``prepare_`` checks an op's arguments and makes room for its result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxdit.errors import BackendError, FormatError
from mxdit.numerics import reference
from mxdit.numerics.checks import check_encode, check_mul_scale, check_output, check_packed, check_weight
from mxdit.numerics.formats import FORMATS, SCHEMES, BlockFormat

MEMORY_LAYOUTS = {"packed": None, "nz": "npu"}
"""How a weight can lie in memory, each with the one device type that reads it so, None for all: canonical codes; four-bit
codes (N, K/2) as int8 in the fractal blocks of Ascend's matrix unit."""
_DUAL = FORMATS["mxfp4_dualscale"]
_PRODUCTS = {  # (activation, weight) formats of mxdit::matmul, and the scheme that it is part of
    ("mxfp4", "mxfp4"): SCHEMES["w4a4"],
    ("mxfp8", "mxfp4"): SCHEMES["w4a8"],
    ("mxfp8", "mxfp8"): SCHEMES["w8a8"],
}


def matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    a_fmt: str,
    w_fmt: str,
    out: torch.dtype,
) -> Tensor:
    """``npu_quant_matmul``, MX: activations (..., K) times weights (N, K) is (..., N) in ``out``.

    Formats: mxfp4 x mxfp4, mxfp8 x mxfp8, and mxfp8 activations x mxfp4 weights (never to fp32, section 4.2).
    ``bias`` is (N,) of any float dtype. Arithmetic: `mxdit.numerics.reference`."""
    result = prepare_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    left = reference.packed_rows(_flat(a), _flat(a_scale), a_fmt)
    right = reference.packed_rows(w, w_scale, w_fmt)
    reference.matmul(left, right, w.shape[1] * FORMATS[w_fmt].per_byte, _fp32(bias), _flat(result))
    return result


def prepare_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    a_fmt: str,
    w_fmt: str,
    out: torch.dtype,
) -> Tensor:
    """Check the arguments of `matmul`, and make room for what it returns."""
    where = "mxdit::matmul"
    if (a_fmt, w_fmt) not in _PRODUCTS:
        raise FormatError(
            "no scheme multiplies these formats",
            where=where,
            got=f"{a_fmt} activations, {w_fmt} weights",
            expected=" or ".join(f"{left} x {right}" for left, right in _PRODUCTS),
        )
    check_packed(a, a_scale, None, FORMATS[a_fmt], where=f"{where}, activations")
    check_weight(w, w_scale, None, FORMATS[w_fmt], bias, a.shape[-1] * FORMATS[a_fmt].per_byte, where=where)
    check_output(out, _PRODUCTS[a_fmt, w_fmt].outputs, where=where)
    return w.new_empty((*a.shape[:-1], w.shape[0]), dtype=out)


def matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """``npu_dual_level_quant_matmul``: activations (..., K) times weights (N, K) is (..., N) in ``out``, bf16 or fp16.

    ``a_l0`` is (..., ceil(K/512)) and ``w_l0`` (N, ceil(K/512)), fp32; ``bias`` is (N,) of any float dtype.
    Arithmetic: `mxdit.numerics.reference`."""
    result = prepare_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    left = reference.packed_rows(_flat(a), _flat(a_l1), _DUAL.name)
    right = reference.packed_rows(w, w_l1, _DUAL.name)
    reference.matmul_groups(left, right, w.shape[1] * 2, _flat(a_l0), w_l0, _fp32(bias), _flat(result))
    return result


def prepare_matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """Check the arguments of `matmul_dual`, and make room for what it returns."""
    where = "mxdit::matmul_dual"
    check_packed(a, a_l1, a_l0, _DUAL, where=f"{where}, activations")
    check_weight(w, w_l1, w_l0, _DUAL, bias, a.shape[-1] * 2, where=where)
    check_output(out, SCHEMES["w4a4"].output_dtypes(_DUAL.name), where=where)
    return w.new_empty((*a.shape[:-1], w.shape[0]), dtype=out)


def linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_dual: Tensor | None,
    mul_scale: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    rule: str,
    layout: str,
) -> Tensor:
    """Quantize x as ``scheme`` says and multiply: (..., K) to (..., N) in x's dtype; quantize and matmul in one.

    ``w_dual`` (N, ceil(K/512)) fp32 is what makes a weight dual-scale. ``mul_scale`` (K,) goes with four-bit weights and
    multiplies x first, in x's dtype, whatever the scheme (section 5.3). ``rule`` is the activation's scale rule; schemes that
    leave x in its own float dtype, and dual-scale activations, which have one rule, do not read it. ``layout`` is one of
    `MEMORY_LAYOUTS`; the reference reads ``packed`` only.
    """
    weight, activation = check_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    if layout != "packed":
        raise BackendError(
            "the reference reads the canonical layout only", where="mxdit::linear", got=f"layout={layout!r}"
        )
    if w_dual is not None and activation == weight.name:
        codes, l0, l1 = torch.ops.mxdit.quantize_dual(x, mul_scale, "rint")
        return torch.ops.mxdit.matmul_dual(codes, w, l0, w_dual, l1, w_scale, bias, x.dtype)
    if mul_scale is not None:
        x = x * mul_scale.to(x.dtype)
    if activation is None:
        left = reference.float_rows(_flat(x))
    else:
        codes, scale = torch.ops.mxdit.quantize(x, activation, rule, "rint")
        if w_dual is None:
            return torch.ops.mxdit.matmul(codes, scale, w, w_scale, bias, activation, weight.name, x.dtype)
        left = reference.packed_rows(_flat(codes), _flat(scale), activation)
    right = reference.packed_rows(w, w_scale, weight.name)
    result = x.new_empty((*x.shape[:-1], w.shape[0]))
    if w_dual is None:
        reference.matmul(left, right, x.shape[-1], _fp32(bias), _flat(result))
    else:
        reference.matmul_groups(left, right, x.shape[-1], None, w_dual, _fp32(bias), _flat(result))
    return result


def prepare_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_dual: Tensor | None,
    mul_scale: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    rule: str,
    layout: str,
) -> Tensor:
    """Check the arguments of `linear`, and make room for what it returns."""
    check_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def check_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_dual: Tensor | None,
    mul_scale: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    rule: str,
    layout: str,
) -> tuple[BlockFormat, str | None]:
    """Check the arguments of `linear`: the weight's format, and the name of the activation's, None where it stays a float."""
    where = "mxdit::linear"
    if layout not in MEMORY_LAYOUTS or MEMORY_LAYOUTS[layout] not in (None, x.device.type):
        raise BackendError(
            "no backend for this device reads this weight layout",
            where=where,
            got=f"layout={layout!r} on {x.device.type}",
            expected=" or ".join(
                repr(name) for name, device in MEMORY_LAYOUTS.items() if device in (None, x.device.type)
            ),
            hint="Load the weight in its canonical layout.",
        )
    if layout != "packed":
        w = _packed_like(w, where=where)
    weight = weight_format(w_dual, scheme)
    activation = SCHEMES[scheme].weights[weight.name]
    if activation is not None:
        row = FORMATS[activation]
        check_encode(x, row, row.default_rule if row.outer else rule, "rint", None, where=where)
    check_output(x.dtype, SCHEMES[scheme].output_dtypes(weight.name), where=where)
    check_weight(w, w_scale, w_dual, weight, bias, x.shape[-1], where=where)
    if mul_scale is not None:
        check_mul_scale(mul_scale, x.shape[-1], weight, where=where)
    return weight, activation


def _packed_like(w: Tensor, *, where: str) -> Tensor:
    """Canonical codes, without their data, of the weight that ``w`` holds in fractal blocks."""
    if w.dim() != 2 or w.dtype is not torch.int8:
        raise FormatError(
            "no weight in the nz layout",
            where=where,
            got=f"{tuple(w.shape)} {w.dtype}",
            expected="(N, K/2) of torch.int8",
        )
    return torch.empty(w.shape, dtype=torch.uint8, device="meta")


def weight_format(w_dual: Tensor | None, scheme: str) -> BlockFormat:
    """The format of a weight that this scheme multiplies: an outer scale makes it dual."""
    if scheme not in SCHEMES:
        raise FormatError("unknown scheme", where="mxdit::linear", got=repr(scheme), expected=" or ".join(SCHEMES))
    for name in SCHEMES[scheme].weights:
        if bool(FORMATS[name].outer) == (w_dual is not None):
            return FORMATS[name]
    raise FormatError(
        f"{scheme} takes no dual-scale weights",
        where="mxdit::linear",
        got="an outer scale",
        expected=" or ".join(SCHEMES[scheme].weights),
    )


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
