"""``torch.ops.mxdit``: schemas, argument checks, fake implementations, and the reference on every device.

The schemas mirror the Ascend operators (docs/numerics.md sections 2.1, 3.1 and 4). Only plain tensors and registry
names cross them. Shapes are canonical: row-major, last axis K, scales neither padded nor paired, weights (N, K). Any
leading axes, zero rows included, are activations. A backend registers its own kernel for its device type and answers
with the same bits.

What an op cannot take is a FormatError before any work, from the fake implementations too. Limits on shapes that only
one device has (such as K in multiples of 64) are that backend's to refuse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_fake

from mxdit.errors import BackendError, FormatError
from mxdit.numerics import reference
from mxdit.numerics.checks import check_encode, check_float, check_mul_scale, check_output, check_packed, check_weight
from mxdit.numerics.codec import Packed, decode, encode
from mxdit.numerics.formats import FORMATS, SCHEMES, BlockFormat, block_format

LIBRARY = Library("mxdit", "DEF")
"""The registrations live as long as this object."""

OP_SCHEMAS = (
    "quantize(Tensor x, str fmt, str rule, str round_mode) -> (Tensor codes, Tensor scale)",
    "quantize_dual(Tensor x, Tensor? mul_scale, str round_mode) -> (Tensor codes, Tensor l0, Tensor l1)",
    "dequantize(Tensor codes, Tensor scale, Tensor? outer, str fmt, ScalarType dtype) -> Tensor",
    "matmul(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, str a_fmt, str w_fmt, ScalarType out)"
    " -> Tensor",
    "matmul_dual(Tensor a, Tensor w, Tensor a_l0, Tensor w_l0, Tensor a_l1, Tensor w_l1, Tensor? bias, ScalarType out)"
    " -> Tensor",
    "linear(Tensor x, Tensor w, Tensor w_scale, Tensor? w_dual, Tensor? mul_scale, Tensor? bias, str scheme, str rule,"
    " str layout) -> Tensor",
)
LAYOUTS = {"packed": None, "numeric": "npu", "nz": "npu"}
"""How a weight can lie in memory, each with the one device type that reads it so, None for all: canonical codes; (N, K)
floats that hold E2M1 values; four-bit codes (N, K/2) as int8 in the fractal blocks of Ascend's matrix unit."""
_DUAL = FORMATS["mxfp4_dualscale"]
_PRODUCTS = {  # (activation, weight) formats of mxdit::matmul, and the scheme that it is part of
    ("mxfp4", "mxfp4"): SCHEMES["w4a4"],
    ("mxfp8", "mxfp4"): SCHEMES["w4a8"],
    ("mxfp8", "mxfp8"): SCHEMES["w8a8"],
}


# -- quantize and dequantize -------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """``npu_dynamic_mx_quant``: x (..., K) bf16, fp16 or fp32 to codes (..., K/2) (mxfp8: (..., K)) and scale
    (..., ceil(K/32)), both uint8."""
    _check_single(fmt)
    packed = encode(x, fmt, rule, round_mode)
    return packed.codes, packed.scale


def fake_quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    row = _check_single(fmt)
    check_encode(x, row, rule, round_mode, None, where="mxdit::quantize")
    return _empty_packed(x, row)


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """``npu_dynamic_dual_level_mx_quant``: x (..., K) bf16 or fp16 to codes (..., K/2) uint8, l0 (..., ceil(K/512)) fp32
    and l1 (..., ceil(K/32)) uint8. ``mul_scale`` (K,) is cast to x's dtype."""
    packed = encode(x, _DUAL.name, None, round_mode, mul_scale)
    assert packed.outer is not None
    return packed.codes, packed.outer, packed.scale


def fake_quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    check_encode(x, _DUAL, _DUAL.default_rule, round_mode, mul_scale, where="mxdit::quantize_dual")
    codes, l1 = _empty_packed(x, _DUAL)
    return codes, x.new_empty((*x.shape[:-1], _DUAL.groups(x.shape[-1])), dtype=torch.float32), l1


def dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """The values of packed codes, (..., K) in ``dtype``; see `mxdit.decode`."""
    return decode(Packed(codes, scale, outer, fmt), dtype)


def fake_dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    row = block_format(fmt, where="mxdit::dequantize")
    check_packed(codes, scale, outer, row, where="mxdit::dequantize")
    check_float(dtype, where="mxdit::dequantize")
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * row.per_byte), dtype=dtype)


# -- matmul ------------------------------------------------------------------------------------------------------------


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
    result = fake_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    left = reference.packed_rows(_flat(a), _flat(a_scale), a_fmt)
    right = reference.packed_rows(w, w_scale, w_fmt)
    reference.matmul(left, right, w.shape[1] * FORMATS[w_fmt].per_byte, _fp32(bias), _flat(result))
    return result


def fake_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    a_fmt: str,
    w_fmt: str,
    out: torch.dtype,
) -> Tensor:
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
    result = fake_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    left = reference.packed_rows(_flat(a), _flat(a_l1), _DUAL.name)
    right = reference.packed_rows(w, w_l1, _DUAL.name)
    reference.matmul_groups(left, right, w.shape[1] * 2, _flat(a_l0), w_l0, _fp32(bias), _flat(result))
    return result


def fake_matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    where = "mxdit::matmul_dual"
    check_packed(a, a_l1, a_l0, _DUAL, where=f"{where}, activations")
    check_weight(w, w_l1, w_l0, _DUAL, bias, a.shape[-1] * 2, where=where)
    check_output(out, SCHEMES["w4a4"].output_dtypes(_DUAL.name), where=where)
    return w.new_empty((*a.shape[:-1], w.shape[0]), dtype=out)


# -- linear ------------------------------------------------------------------------------------------------------------


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

    ``w_dual`` (N, ceil(K/512)) fp32 is what makes a weight dual-scale; ``mul_scale`` (K,) goes with it and multiplies
    x in x's dtype whatever the scheme. ``rule`` is the activation's scale rule; schemes that leave x in its own float
    dtype, and dual-scale activations, which have one rule, do not read it. ``layout`` is one of `LAYOUTS`; the reference
    reads ``packed`` only.
    """
    result = fake_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    weight = weight_format(w_dual, scheme)
    activation = SCHEMES[scheme].weights[weight.name]
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
    if w_dual is None:
        reference.matmul(left, right, x.shape[-1], _fp32(bias), _flat(result))
    else:
        reference.matmul_groups(left, right, x.shape[-1], None, w_dual, _fp32(bias), _flat(result))
    return result


def fake_linear(
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
    where = "mxdit::linear"
    if layout not in LAYOUTS or LAYOUTS[layout] not in (None, x.device.type):
        raise BackendError(
            "no backend for this device reads this weight layout",
            where=where,
            got=f"layout={layout!r} on {x.device.type}",
            expected=" or ".join(repr(name) for name, device in LAYOUTS.items() if device in (None, x.device.type)),
            hint="Load the weight in its canonical layout.",
        )
    if layout != "packed":
        w = _packed_like(w, layout, where=where)
    weight = weight_format(w_dual, scheme)
    activation = SCHEMES[scheme].weights[weight.name]
    if mul_scale is not None:
        check_mul_scale(mul_scale, x.shape[-1], weight, where=where)
    if activation is not None:
        row = FORMATS[activation]
        check_encode(x, row, row.default_rule if row.outer else rule, "rint", None, where=where)
    check_output(x.dtype, SCHEMES[scheme].output_dtypes(weight.name), where=where)
    check_weight(w, w_scale, w_dual, weight, bias, x.shape[-1], where=where)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _packed_like(w: Tensor, layout: str, *, where: str) -> Tensor:
    """Canonical codes, without their data, of the weight that ``w`` holds in another layout."""
    dtypes = (torch.int8,) if layout == "nz" else (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
    per_value = 1 if layout == "nz" else 2
    if w.dim() != 2 or w.dtype not in dtypes or w.shape[1] % per_value:
        raise FormatError(
            f"no weight in the {layout} layout",
            where=where,
            got=f"{tuple(w.shape)} {w.dtype}",
            expected=f"{'(N, K/2)' if layout == 'nz' else '(N, K)'} of {' or '.join(map(str, dtypes))}",
        )
    return torch.empty((w.shape[0], w.shape[1] // per_value), dtype=torch.uint8, device="meta")


# -- shared ------------------------------------------------------------------------------------------------------------


def _check_single(fmt: str) -> BlockFormat:
    row = block_format(fmt, where="mxdit::quantize")
    if row.outer:
        raise FormatError(f"{fmt} has two scale levels", where="mxdit::quantize", hint="Call mxdit::quantize_dual.")
    return row


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


def _empty_packed(x: Tensor, row: BlockFormat) -> tuple[Tensor, Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // row.per_byte), dtype=torch.uint8)
    return codes, x.new_empty((*lead, row.blocks(k)), dtype=torch.uint8)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _register() -> None:
    implementations = {
        "quantize": (quantize, fake_quantize),
        "quantize_dual": (quantize_dual, fake_quantize_dual),
        "dequantize": (dequantize, fake_dequantize),
        "matmul": (matmul, fake_matmul),
        "matmul_dual": (matmul_dual, fake_matmul_dual),
        "linear": (linear, fake_linear),
    }
    for schema in OP_SCHEMAS:
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel, fake = implementations[name]
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        register_fake(f"mxdit::{name}", fake, lib=LIBRARY)


_register()
