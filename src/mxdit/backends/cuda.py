"""NVIDIA GPUs: the ops of mxdit as Triton kernels (triton_codec.py, triton_matmul.py, triton_attention.py,
triton_attention_int8.py, triton_rowwise.py), registered on torch's CUDA device.

docs/cuda.md says which way a product takes and why it is exact. The environment variable MXDIT_CUDA_ROUTE forces one. Nothing
here waits for the device, so that CUDA graphs capture the ops.

Triton is imported by the functions of this file, and nowhere else.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from mxdit.backends.record import Backend
from mxdit.errors import BackendError
from mxdit.numerics.codec import Packed
from mxdit.numerics.formats import FORMATS
from mxdit.ops import attention as attention_ops
from mxdit.ops import implement, products
from mxdit.ops import quantize as quantize_ops
from mxdit.ops import rowwise as rowwise_ops

logger = logging.getLogger(__name__)

VARIABLE = "MXDIT_CUDA_ROUTE"
ROUTES = {
    "int8": "four-bit products by int8 tensor cores, others and far-apart scales by bf16",
    "bf16": "products by bf16 tensor cores",
    "fp4": "four-bit products by FP4 tensor cores, others by bf16",
    "reference": "the reference",
}
OLDEST = (8, 0)  # compute capability: the first with bf16
BLACKWELL = (10, 0)  # the first with FP4; Triton has int8 of sm_100 but not of sm_103
WIDEST = 256  # channels of a head: what registers and shared memory hold of a tile
_DUAL = "mxfp4_dualscale"
_ATTENTION = {"exact": "attention", "int8": "attention_int8"}  # the kernels of each method


# -- whether it can run, and how ---------------------------------------------------------------------------------------


def why_not(index: int = 0) -> str | None:
    """None where the kernels answer on that GPU, else the reason in words."""
    try:
        if _asked() == "reference":
            return f"the reference was chosen ({VARIABLE})"
        if find_spec("triton") is None:
            return "triton is not installed; torch's builds for CUDA bring it, and so does `pip install triton`"
        if torch.version.cuda is None and torch.version.hip is None:
            return f"torch {torch.__version__} is built without CUDA; install a build with it"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; nvidia-smi must list one, and CUDA_VISIBLE_DEVICES must not hide it"
        reason = _unfit(index)
        if reason is None:
            route(index)
        return reason
    except BackendError as error:  # what the environment asks for is not to be had: an op raises it
        return str(error)


@cache
def _unfit(index: int) -> str | None:
    """Why the reference has to answer on this GPU."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return f"{name}: nobody has run the kernels on ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < OLDEST:
        return f"{name} is sm_{major}{minor}; the kernels take sm_{OLDEST[0]}{OLDEST[1]} or newer"
    try:
        import_module("triton").runtime.driver.active.get_current_target()
    except (
        ImportError,
        OSError,
        RuntimeError,
        SubprocessError,
    ) as error:  # it compiles its launcher when it is first asked
        said = str(error).strip().partition("\n")[0]
        return f"{name}: triton does not start ({said}); it takes a C compiler and Python's headers"
    return None


def about(index: int = 0) -> str:
    """Device and version, and which way products go."""
    major, minor = torch.cuda.get_device_capability(index)
    triton = import_module("triton")
    return (
        f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, triton {triton.__version__}; {ROUTES[route(index)]}"
    )


def route(index: int) -> str:
    """The way that four-bit products go on that GPU: what the environment names, or int8, and bf16 from Blackwell on.

    Raises:
        BackendError: where the environment names what is not to be had.
    """
    asked, capability = _asked(), torch.cuda.get_device_capability(index)
    if asked == "fp4" and capability < BLACKWELL:
        raise BackendError(
            "no FP4 tensor cores",
            where=f"{VARIABLE}=fp4",
            got=f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}",
            expected="sm_100 or newer",
            hint=f"Unset {VARIABLE}.",
        )
    return asked or ("int8" if capability < BLACKWELL else "bf16")


def _asked() -> str | None:
    """What the environment names, if anything."""
    asked = os.environ.get(VARIABLE)
    if asked and asked not in ROUTES:
        raise BackendError("no such route", where=VARIABLE, got=repr(asked), expected=" or ".join(ROUTES))
    return asked or None


# -- the ops -----------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """`mxdit.ops.quantize`."""
    if _referred(x):
        return quantize_ops.quantize(x, fmt, rule, round_mode)
    codes, scale = quantize_ops.prepare_quantize(x, fmt, rule, round_mode)
    _encode(x, None, codes, scale, None, fmt, rule, round_mode)
    return codes, scale


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """`mxdit.ops.quantize_dual`."""
    if _referred(x):
        return quantize_ops.quantize_dual(x, mul_scale, round_mode)
    codes, l0, l1 = quantize_ops.prepare_quantize_dual(x, mul_scale, round_mode)
    _encode(x, mul_scale, codes, l1, l0, _DUAL, "ocp", round_mode)
    return codes, l0, l1


def dequantize(codes: Tensor, scale: Tensor, outer: Tensor | None, fmt: str, dtype: torch.dtype) -> Tensor:
    """`mxdit.ops.dequantize`."""
    if _referred(codes):
        return quantize_ops.dequantize(codes, scale, outer, fmt, dtype)
    out = quantize_ops.prepare_dequantize(codes, scale, outer, fmt, dtype)
    if out.numel():
        with _on(codes):
            parts = [_flat(part) for part in (codes, scale, outer)]
            _kernels("codec").decode(*parts, _flat(out), FORMATS[fmt])
    return out


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
    if _referred(a):
        return products.matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    result = products.prepare_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    _multiply(Packed(a, a_scale, None, a_fmt), Packed(w, w_scale, None, w_fmt), bias, result)
    return result


def matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """`mxdit.ops.matmul_dual`."""
    if _referred(a):
        return products.matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    result = products.prepare_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    _multiply(Packed(a, a_l1, a_l0, _DUAL), Packed(w, w_l1, w_l0, _DUAL), bias, result)
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
    """`mxdit.ops.linear`."""
    if _referred(x):
        return products.linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    weight, activation = products.check_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    result = x.new_empty((*x.shape[:-1], w.shape[0]))
    a: Packed | Tensor
    if activation is None:
        a = x if mul_scale is None else x * mul_scale.to(x.dtype)
    else:
        row = FORMATS[activation]
        codes, scale = quantize_ops.empty_packed(x, row)
        outer = x.new_empty((*x.shape[:-1], row.groups(x.shape[-1])), dtype=torch.float32) if row.outer else None
        _encode(x, mul_scale, codes, scale, outer, activation, row.default_rule if row.outer else rule, "rint")
        a = Packed(codes, scale, outer, activation)
    _multiply(a, Packed(w, w_scale, w_dual, weight.name), bias, result)
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, method: str) -> Tensor:
    """`mxdit.ops.attention`."""
    if _referred(q):
        return attention_ops.attention(q, k, v, mask, scale, causal, method)
    result = attention_ops.prepare_attention(q, k, v, mask, scale, causal, method)
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST:
        _warn(f"heads of {widest} channels, where the kernels of attention take {WIDEST} at most")
        return attention_ops.attention(q, k, v, mask, scale, causal, method)
    if result.numel():
        _check_together(q, k, v, mask)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if mask is not None:
            mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
            mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        with _on(q):
            _kernels(_ATTENTION[method]).attend(q, k, v, mask, scale, causal, result)
    return result


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> Tensor:
    """`mxdit.ops.rms_norm`."""
    if _referred(x):
        return rowwise_ops.rms_norm(x, weight, eps, cos, sin, rounded)
    result = rowwise_ops.prepare_rms_norm(x, weight, eps, cos, sin, rounded)
    _norm(x, weight, eps, cos, sin, rounded, result)
    return result


def rms_norm_(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool
) -> None:
    """`mxdit.ops.rms_norm_`."""
    if _referred(x):
        return rowwise_ops.rms_norm_(x, weight, eps, cos, sin, rounded)
    rowwise_ops.prepare_rms_norm_(x, weight, eps, cos, sin, rounded)
    _norm(x, weight, eps, cos, sin, rounded, x)


def gelu_(x: Tensor) -> None:
    """`mxdit.ops.gelu_`."""
    if _referred(x):
        return rowwise_ops.gelu_(x)
    rowwise_ops.prepare_gelu_(x)
    dense = x.contiguous()
    if dense.numel():
        with _on(x):
            _kernels("rowwise").gelu_(dense)
    if dense is not x:
        x.copy_(dense)


def _norm(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None, rounded: bool, out: Tensor
) -> None:
    if not x.numel():
        return
    _check_together(x, weight, cos, sin)
    weight, cos, sin = (None if part is None else part.contiguous() for part in (weight, cos, sin))
    tokens, token_rows = 1 if cos is None else len(cos), math.prod(x.shape[2:-1])
    rows = rowwise_ops.own_rows(x) if out is x else _rows(x)
    to = rows if out is x else _rows(out)
    with _on(x):
        _kernels("rowwise").rms_norm(rows, weight, eps, cos, sin, rounded, tokens, token_rows, to)
    if to.data_ptr() != out.data_ptr():  # x had no such rows, these are a copy
        out.copy_(to.view(out.shape))


def _encode(
    x: Tensor,
    mul_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    outer: Tensor | None,
    fmt: str,
    rule: str,
    mode: str,
) -> None:
    if not x.numel():
        return
    rows = _rows(x)
    mul = None if mul_scale is None else mul_scale.to(x.dtype).contiguous()
    with _on(x):
        _kernels("codec").encode(rows, mul, codes, scale, outer, FORMATS[fmt], rule, mode)


def _multiply(a: Packed | Tensor, w: Packed, bias: Tensor | None, result: Tensor) -> None:
    if not result.numel():
        return
    left = Packed(_flat(a.codes), _flat(a.scale), _flat(a.outer), a.fmt) if isinstance(a, Packed) else _flat(a)
    right = Packed(w.codes.contiguous(), w.scale.contiguous(), _flat(w.outer), w.fmt)
    bias = None if bias is None else bias.contiguous()
    _check_together(left.codes if isinstance(left, Packed) else left, right.codes, result, bias)
    with _on(result):
        _kernels("matmul").multiply(left, right, bias, _flat(result), route(result.device.index or 0))


# -- shared ------------------------------------------------------------------------------------------------------------


def _kernels(name: str) -> Any:
    return import_module(f"mxdit.backends.triton_{name}")


def _referred(x: Tensor) -> bool:
    """Whether the reference answers on that tensor's GPU, which is said once for each."""
    if _asked() == "reference":
        return True
    reason = _unfit(x.device.index or 0)
    if reason:
        _warn(reason)
    return reason is not None


@cache
def _warn(reason: str) -> None:
    logger.warning("the reference computes mxdit's ops, in plain torch and slowly: %s", reason)


def _check_together(*operands: Tensor | None) -> None:
    here = {tensor.device for tensor in operands if tensor is not None}
    if len(here) > 1:  # a kernel would follow another GPU's pointers
        raise BackendError(
            "operands on several devices", where="mxdit on cuda", got=" and ".join(sorted(map(str, here)))
        )


@contextmanager
def _on(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which may be another. What it does not compile or launch raises what a kernel of
    torch's would."""
    try:
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            yield
    except import_module("triton.errors").TritonError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _rows(x: Tensor) -> Tensor:
    """x as (rows, K) whose K is contiguous, the same memory where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flat(x: Tensor | None) -> Any:
    """(..., K) as contiguous (rows, K); None as None."""
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


BACKEND = Backend(name="cuda (triton)", device="cuda", why_not=why_not, about=about)


def register() -> None:
    """Let these kernels answer on CUDA tensors."""
    implement("CUDA", sys.modules[__name__])


if find_spec("triton") is not None:
    register()
