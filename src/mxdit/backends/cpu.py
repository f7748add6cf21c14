"""The native CPU kernels (csrc/cpu), called through their C ABI and registered on torch's CPU device.

They give the bits of the reference on every instruction set path, of which `mxdit.backends.native` chooses one;
`usable_threads` says how many threads.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mxdit.backends import native
from mxdit.backends.record import Backend
from mxdit.backends.threads import usable_threads
from mxdit.errors import BackendError
from mxdit.numerics.formats import FORMATS
from mxdit.ops import attention as attention_ops
from mxdit.ops import implement, products
from mxdit.ops import quantize as quantize_ops
from mxdit.ops import rowwise as rowwise_ops

_T = TypeVar("_T")

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_RULES = {"ocp": 0, "uos": 1, "even6": 2, "even7": 3, "cublas": 4}
_ROUND_MODES = {"rint": 0, "round": 1, "floor": 2}
_FP4, _FP8, _FLOAT = range(3)
_FORMATS = {"mxfp4": _FP4, "mxfp4_dualscale": _FP4, "mxfp8": _FP8, None: _FLOAT}
_METHODS = {"exact": 0, "int8": 1}
_NO_MASK, _BOOL_MASK = -1, 3

# The structs of csrc/cpu/mxdit_cpu.h. Packed by `struct`, in a quarter of the time of ctypes' own.
_ENCODE = struct.Struct("@P3q4i4P")
_DECODE = struct.Struct("@3P2q2iP")
_LINEAR = struct.Struct("@4q10P7i")
_ATTENTION = struct.Struct("@7q3P9qP4qPf4i")
_RMS_NORM = struct.Struct("@4q5P3qf2i")
_GELU = struct.Struct("@Pqi")


def _refer(op: Callable[..., _T], *args: object) -> _T:
    """What the reference says, unless the environment asked for something else."""
    if native.refusal is not None:
        raise native.refusal
    return op(*args)


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """`mxdit.ops.quantize`."""
    if native.by_reference:
        return _refer(quantize_ops.quantize, x, fmt, rule, round_mode)
    codes, scale = quantize_ops.prepare_quantize(x, fmt, rule, round_mode)
    _encode(x, fmt, _RULES[rule], round_mode, None, codes, scale, None)
    return codes, scale


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """`mxdit.ops.quantize_dual`."""
    if native.by_reference:
        return _refer(quantize_ops.quantize_dual, x, mul_scale, round_mode)
    codes, l0, l1 = quantize_ops.prepare_quantize_dual(x, mul_scale, round_mode)
    _encode(x, "mxfp4_dualscale", _RULES["ocp"], round_mode, mul_scale, codes, l1, l0)
    return codes, l0, l1


def dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """`mxdit.ops.dequantize`."""
    if native.by_reference:
        return _refer(quantize_ops.dequantize, codes, scale, outer, fmt, dtype)
    out = quantize_ops.prepare_dequantize(codes, scale, outer, fmt, torch.float32 if dtype is torch.float64 else dtype)
    if out.numel():
        k, parts = out.shape[-1], [_dense(part) for part in (codes, scale, outer)]
        job = (*map(_pointer, parts), out.numel() // k, k, _FORMATS[fmt], _DTYPES[out.dtype], out.data_ptr())
        _call("mx_decode", _DECODE.pack(*job))
    return out.to(dtype)


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
    """`mxdit.ops.matmul`."""
    if native.by_reference:
        return _refer(products.matmul, a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    result = products.prepare_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    _multiply_packed(a, a_scale, None, a_fmt, w, w_scale, None, w_fmt, bias, result)
    return result


def matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """`mxdit.ops.matmul_dual`."""
    if native.by_reference:
        return _refer(products.matmul_dual, a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    result = products.prepare_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    _multiply_packed(a, a_l1, a_l0, "mxfp4", w, w_l1, w_l0, "mxfp4", bias, result)
    return result


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
    """`mxdit.ops.linear`, quantizing and multiplying in one call."""
    if native.by_reference:
        return _refer(products.linear, x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    # Small layers feel every microsecond here, so arguments of a kind that was found good are not checked again.
    kind = (
        x.dtype, x.shape[-1:], w.dtype, w.shape, w_scale.dtype, w_scale.shape,
        w_dual is not None and (w_dual.dtype, w_dual.shape), mul_scale is not None and (mul_scale.dtype, mul_scale.shape),
        bias is not None and (bias.dtype, bias.shape), scheme, rule, layout,
    )  # fmt: skip
    formats = _checked.get(kind)
    if formats is None:
        weight, activation = products.check_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
        dual = activation == "mxfp4_dualscale"
        scale_rule = 0 if activation is None or dual else _RULES[rule]
        dtype = _DTYPES[x.dtype]
        formats = dtype, _FORMATS[activation], scale_rule, _FORMATS[weight.name], _bias_dtype(bias), dtype, dual
        _checked[kind] = formats
    n, k = w.shape[0], x.shape[-1]
    result = x.new_empty((*x.shape[:-1], n))
    size = result.numel()
    if size:
        rows = x if x.is_contiguous() else _rows(x)
        stride = k if rows is x else rows.stride(0)
        multipliers = _multipliers(mul_scale, x.dtype)
        w, w_scale, w_dual, bias = w.contiguous(), w_scale.contiguous(), _dense(w_dual), _bias(bias)
        job = _LINEAR.pack(
            size // n, n, k, stride, rows.data_ptr(), _pointer(multipliers), 0, 0, 0,
            w.data_ptr(), w_scale.data_ptr(), _pointer(w_dual), _pointer(bias), result.data_ptr(), *formats,
        )  # fmt: skip
        _call("mx_linear", job)
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str) -> Tensor:
    """`mxdit.ops.attention`."""
    if native.by_reference:
        return _refer(attention_ops.attention, q, k, v, mask, scale, causal, method)
    result = attention_ops.prepare_attention(q, k, v, mask, scale, causal, method)
    if result.numel():
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
        if mask is not None:
            mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        dtype = _NO_MASK if mask is None else _BOOL_MASK if mask.dtype is torch.bool else _DTYPES[mask.dtype]
        job = _ATTENTION.pack(
            *q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], v.shape[3], q.data_ptr(), k.data_ptr(), v.data_ptr(),
            *strides, _pointer(mask), *((0,) * 4 if mask is None else mask.stride()), result.data_ptr(), scale,
            _DTYPES[q.dtype], dtype, causal, _METHODS[method],
        )  # fmt: skip
        _call("mx_attention", job)
    return result


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> Tensor:
    """`mxdit.ops.rms_norm`."""
    if native.by_reference:
        return _refer(rowwise_ops.rms_norm, x, weight, eps, cos, sin, rounded)
    result = rowwise_ops.prepare_rms_norm(x, weight, eps, cos, sin, rounded)
    _norm(_rows(x), weight, eps, cos, sin, rounded, x.shape, result.view(-1, x.shape[-1]))
    return result


def rms_norm_(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> None:
    """`mxdit.ops.rms_norm_`."""
    if native.by_reference:
        return _refer(rowwise_ops.rms_norm_, x, weight, eps, cos, sin, rounded)
    rowwise_ops.prepare_rms_norm_(x, weight, eps, cos, sin, rounded)
    rows = rowwise_ops.own_rows(x)
    _norm(rows, weight, eps, cos, sin, rounded, x.shape, rows)
    if rows.data_ptr() != x.data_ptr():  # x had no such rows, these are a copy
        x.copy_(rows.view(x.shape))


def gelu_(x: Tensor) -> None:
    """`mxdit.ops.gelu_`."""
    if native.by_reference:
        return _refer(rowwise_ops.gelu_, x)
    rowwise_ops.prepare_gelu_(x)
    dense = x.contiguous()
    _call("mx_gelu", _GELU.pack(dense.data_ptr(), dense.numel(), _DTYPES[x.dtype]))
    if dense is not x:
        x.copy_(dense)


_checked: dict[tuple[object, ...], tuple[int, ...]] = {}  # as many as a program's models have kinds of layers


def _multiply_packed(
    a: Tensor,
    a_scale: Tensor,
    a_outer: Tensor | None,
    a_fmt: str,
    w: Tensor,
    w_scale: Tensor,
    w_outer: Tensor | None,
    w_fmt: str,
    bias: Tensor | None,
    result: Tensor,
) -> None:
    if not result.numel():
        return
    n, k = w.shape[0], w.shape[1] * FORMATS[w_fmt].per_byte
    parts = [_dense(part) for part in (a, a_scale, a_outer, w, w_scale, w_outer, _bias(bias))]
    job = _LINEAR.pack(
        result.numel() // n, n, k, 0, 0, 0, *map(_pointer, parts), result.data_ptr(),
        0, _FORMATS[a_fmt], 0, _FORMATS[w_fmt], _bias_dtype(bias), _DTYPES[result.dtype], a_outer is not None,
    )  # fmt: skip
    _call("mx_linear", job)


def _norm(
    rows: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rounded: bool,
    shape: torch.Size,
    out: Tensor,
) -> None:
    if not rows.numel():
        return
    weight = torch.ones(shape[-1]) if weight is None else weight.float().contiguous()
    cos, sin = _dense(cos), _dense(sin)
    head, tokens = (shape[-1], 1) if cos is None else (cos.shape[1], cos.shape[0])
    job = _RMS_NORM.pack(
        *rows.shape, rows.stride(0), out.stride(0), rows.data_ptr(), weight.data_ptr(), _pointer(cos), _pointer(sin),
        out.data_ptr(), head, tokens, math.prod(shape[2:-1]), eps, _DTYPES[rows.dtype], rounded,
    )  # fmt: skip
    _call("mx_rms_norm", job)


def _encode(
    x: Tensor,
    fmt: str,
    rule: int,
    round_mode: str,
    mul_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    outer: Tensor | None,
) -> None:
    if not x.numel():
        return
    rows, multipliers = _rows(x), _multipliers(mul_scale, x.dtype)
    job = _ENCODE.pack(
        rows.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0), _DTYPES[x.dtype], _FORMATS[fmt], rule,
        _ROUND_MODES[round_mode], _pointer(multipliers), codes.data_ptr(), scale.data_ptr(), _pointer(outer),
    )  # fmt: skip
    _call("mx_encode", job)


def _call(function: str, job: bytes) -> None:
    if getattr(native.library(), function)(job, usable_threads()):
        first, second, third = struct.unpack_from("@3q", job)
        attends = function == "mx_attention"
        raise BackendError(
            "no memory for attention" if attends else "no memory for a product",
            where="mxdit.backends.cpu",
            got=f"batch {first}, {second} queries, {third} keys on {usable_threads()} threads"
            if attends
            else f"M={first}, N={second}, K={third} on {usable_threads()} threads",
            expected="8 MB, or a head's keys and values where they are more, and 0.3 MB for each thread"
            if attends
            else "about 10 MB, with AMX 35, and 2 MB for each thread",
            hint="Free memory, or lower torch.set_num_threads.",
        )


def _rows(x: Tensor) -> Tensor:
    """x as (rows, K) whose K is contiguous, the same memory where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _multipliers(mul_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """mul_scale rounded to the activations' dtype, held in fp32."""
    return None if mul_scale is None else mul_scale.to(dtype).float().contiguous()


def _bias(bias: Tensor | None) -> Tensor | None:
    """The bias in a dtype that the kernels read."""
    return None if bias is None else (bias if bias.dtype in _DTYPES else bias.float()).contiguous()


def _bias_dtype(bias: Tensor | None) -> int:
    return _DTYPES[torch.float32] if bias is None else _DTYPES.get(bias.dtype, _DTYPES[torch.float32])


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


BACKEND = Backend(name="cpu (native)", device="cpu", why_not=native.why_not, about=native.about)


def _register() -> None:
    native.choose()
    if native.library() is None and native.refusal is None:
        return
    implement("CPU", sys.modules[__name__])


_register()
