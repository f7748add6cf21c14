"""The native CPU kernels (csrc/cpu), called through their C ABI and registered on torch's CPU device.

They give the bits of the reference on every instruction set path; docs/cpu.md says which paths there are. The environment
variable MXDIT_CPU_PATH forces one (or ``reference``); the number of threads is torch's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from mxdit import ops
from mxdit.errors import BackendError
from mxdit.formats import FORMATS, SCHEMES

VARIABLE = "MXDIT_CPU_PATH"
REFERENCE = "reference"
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_RULES = {"ocp": 0, "uos": 1, "even6": 2, "even7": 3, "cublas": 4}
_ROUND_MODES = {"rint": 0, "round": 1, "floor": 2}
_NO_LIBRARY = (
    "mxdit was installed without its native library, for want of a C++ compiler; install one, then mxdit again"
)
_FP4, _FP8, _FLOAT = range(3)
_FORMATS = {"mxfp4": _FP4, "mxfp4_dualscale": _FP4, "mxfp8": _FP8, None: _FLOAT}


class _Encode(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "k", "x_stride")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "format", "rule", "round")),
        *((name, ctypes.c_void_p) for name in ("mul_scale", "codes", "scale", "outer")),
    ]


class _Decode(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "outer")),
        *((name, ctypes.c_int64) for name in ("rows", "k")),
        *((name, ctypes.c_int32) for name in ("format", "out_dtype")),
        ("out", ctypes.c_void_p),
    ]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "x_stride")),
        *((name, ctypes.c_void_p) for name in ("x", "mul_scale", "a_codes", "a_scale", "a_outer")),
        *((name, ctypes.c_void_p) for name in ("w_codes", "w_scale", "w_outer", "bias", "out")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "a_format", "rule", "w_format", "out_dtype", "a_dual")),
    ]


# -- which path ----------------------------------------------------------------------------------------------------------

_reference = False  # whether the reference answers although there is a library


@cache
def _library() -> ctypes.CDLL | None:
    """The shared library that was built with the package, or None where it was installed without one."""
    path = Path(
        str(files("mxdit.backends").joinpath("libmxdit_cpu.so"))
    )  # elsewhere than this file in an editable install
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    library.mx_paths.restype = library.mx_selected.restype = ctypes.c_char_p
    library.mx_select.argtypes = [ctypes.c_char_p]
    for name, job in (("mx_encode", _Encode), ("mx_decode", _Decode), ("mx_linear", _Linear)):
        getattr(library, name).argtypes = [ctypes.POINTER(job), ctypes.c_int]
    return library


def paths() -> tuple[str, ...]:
    """The instruction set paths that this CPU runs, best first; empty where there is no native library."""
    library = _library()
    return () if library is None else tuple(library.mx_paths().decode().split())


def selected() -> str:
    """The path that answers now, or ``reference``."""
    library = _library()
    return REFERENCE if library is None or _reference else library.mx_selected().decode()


def select(path: str | None) -> None:
    """Let that path answer from now on, in the whole process: one of `paths`, ``reference``, or None for the best.

    Raises:
        BackendError: for a path that this CPU does not run.
    """
    global _reference
    library = _library()
    if path not in (None, REFERENCE, *paths()):
        raise BackendError(
            "no such instruction set path on this CPU",
            where=VARIABLE if os.environ.get(VARIABLE) == path else "mxdit.backends.cpu.select",
            got=repr(path),
            expected=" or ".join([*paths(), REFERENCE]),
            hint=None if library else f"Native kernels are missing: {_NO_LIBRARY}.",
        )
    _reference = path == REFERENCE
    if library is not None and path != REFERENCE:
        library.mx_select(path.encode() if path else None)


@contextmanager
def using(path: str | None) -> Iterator[None]:
    """`select` for the length of a ``with`` block."""
    before = selected()
    select(path)
    try:
        yield
    finally:
        select(before)


def why_not() -> str | None:
    """None where native kernels answer, else the reason in words."""
    if _library() is None:
        return _NO_LIBRARY
    return f"the reference was chosen ({VARIABLE})" if _reference else None


def about() -> str:
    """The path in use and what else this CPU runs."""
    others = ", ".join(path for path in paths() if path != selected())
    return f"path {selected()}; this CPU also runs {others}" if others else f"path {selected()}"


# -- the ops -------------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """`mxdit.ops.quantize`."""
    if _reference:
        return ops.quantize(x, fmt, rule, round_mode)
    codes, scale = ops.fake_quantize(x, fmt, rule, round_mode)
    _encode(x, fmt, _RULES[rule], round_mode, None, codes, scale, None)
    return codes, scale


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """`mxdit.ops.quantize_dual`."""
    if _reference:
        return ops.quantize_dual(x, mul_scale, round_mode)
    codes, l0, l1 = ops.fake_quantize_dual(x, mul_scale, round_mode)
    _encode(x, "mxfp4_dualscale", _RULES["ocp"], round_mode, mul_scale, codes, l1, l0)
    return codes, l0, l1


def dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """`mxdit.ops.dequantize`."""
    if _reference:
        return ops.dequantize(codes, scale, outer, fmt, dtype)
    out = ops.fake_dequantize(codes, scale, outer, fmt, torch.float32 if dtype is torch.float64 else dtype)
    if out.numel():
        parts = codes.contiguous(), scale.contiguous(), None if outer is None else outer.contiguous()
        k = out.shape[-1]
        job = _Decode(*map(_pointer, parts), out.numel() // k, k, _FORMATS[fmt], _DTYPES[out.dtype], _pointer(out))
        _call("mx_decode", job)
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
    if _reference:
        return ops.matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    result = ops.fake_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    _multiply_packed(a, a_scale, None, a_fmt, w, w_scale, None, w_fmt, bias, result)
    return result


def matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """`mxdit.ops.matmul_dual`."""
    if _reference:
        return ops.matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    result = ops.fake_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
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
    if _reference:
        return ops.linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    result = ops.fake_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    if not result.numel():
        return result
    n, k = w.shape[0], x.shape[-1]
    weight = ops.weight_format(w_dual, scheme)
    activation = SCHEMES[scheme].weights[weight.name]
    dual = activation == "mxfp4_dualscale"
    rows, multipliers = _rows(x), _multipliers(mul_scale, x.dtype)
    parts = w.contiguous(), w_scale.contiguous(), None if w_dual is None else w_dual.contiguous(), _fp32(bias)
    job = _Linear(
        rows.shape[0], n, k, rows.stride(0), rows.data_ptr(), _pointer(multipliers), None, None, None,
        *map(_pointer, parts), result.data_ptr(), _DTYPES[x.dtype], _FORMATS[activation],
        0 if activation is None or dual else _RULES[rule], _FORMATS[weight.name], _DTYPES[x.dtype], dual,
    )  # fmt: skip
    _call("mx_linear", job)
    return result


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
    parts = [None if part is None else part.contiguous() for part in (a, a_scale, a_outer, w, w_scale, w_outer)]
    bias = _fp32(bias)
    job = _Linear(
        result.numel() // n, n, k, 0, None, None, *map(_pointer, parts), _pointer(bias), result.data_ptr(),
        0, _FORMATS[a_fmt], 0, _FORMATS[w_fmt], _DTYPES[result.dtype], a_outer is not None,
    )  # fmt: skip
    _call("mx_linear", job)


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
    job = _Encode(
        rows.data_ptr(), rows.shape[0], rows.shape[1], rows.stride(0), _DTYPES[x.dtype], _FORMATS[fmt], rule,
        _ROUND_MODES[round_mode], _pointer(multipliers), codes.data_ptr(), scale.data_ptr(), _pointer(outer),
    )  # fmt: skip
    _call("mx_encode", job)


def _call(function: str, job: ctypes.Structure) -> None:
    if getattr(_library(), function)(job, torch.get_num_threads()):
        raise BackendError("out of memory", where="mxdit.backends.cpu", got=f"{function} on {selected()}")


def _rows(x: Tensor) -> Tensor:
    """x as (rows, K) whose K is contiguous, the same memory where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _multipliers(mul_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """mul_scale rounded to the activations' dtype, held in fp32."""
    return None if mul_scale is None else mul_scale.to(dtype).float().contiguous()


def _fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _register() -> None:
    if _library() is None:
        return
    select(os.environ.get(VARIABLE) or None)
    kernels: dict[str, Callable[..., object]] = {
        "quantize": quantize,
        "quantize_dual": quantize_dual,
        "dequantize": dequantize,
        "matmul": matmul,
        "matmul_dual": matmul_dual,
        "linear": linear,
    }
    for name, kernel in kernels.items():
        ops.LIBRARY.impl(name, kernel, "CPU")


_register()
