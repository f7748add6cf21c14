"""Ascend A5 (Ascend 950): the ops of mxdit as the MX operators of torch_npu, registered on torch's NPU device.

Each op is one or two operators, called as docs/ascend.md lists them; docs/numerics.md says what they compute. What differs
at this border is made here and never stored: E8M0 scales lie in pairs (..., ceil(K/64), 2), an odd count filled with a zero
byte; a weight (N, K) is handed over as its transposed view; the dual-level product wants its weight in fractal blocks.

torch_npu is imported by the functions of this file, and nowhere else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mxdit.backends.record import Backend, Layout
from mxdit.errors import BackendError
from mxdit.numerics.formats import FORMATS
from mxdit.ops import implement, products
from mxdit.ops import quantize as quantize_ops

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

NEEDED = "torch_npu 2.9.0.post2 or newer, with CANN 9.0.0 or newer"
OPERATORS = (
    "npu_dynamic_mx_quant",
    "npu_quant_matmul",
    "npu_dynamic_dual_level_mx_quant",
    "npu_dual_level_quant_matmul",
    "npu_format_cast",
    "npu_dtype_cast",
)
DEVICES = ("Ascend950", "Ascend910_95")  # how A5 calls itself; the second is its name in older drivers
_DUAL = "mxfp4_dualscale"
_RULES: dict[str, dict[str, Any]] = {  # docs/numerics.md sections 2.2, 2.4 and 2.5
    "ocp": {"scale_alg": 0},
    "cublas": {"scale_alg": 1},
    "even6": {"scale_alg": 2, "dst_type_max": 6.0},
    "even7": {"scale_alg": 2, "dst_type_max": 7.0},
    "uos": {"scale_alg": 2, "dst_type_max": 7.25},
}
_NO_OPERATOR = {
    ("w4a16", "mxfp4"),
    ("w4a16", _DUAL),
    ("w8a16", "mxfp8"),
    ("w4a8", _DUAL),
}  # schemes and weights that the reference multiplies
_LARGEST = 65535  # of N and K, in npu_quant_matmul
_ND, _NZ = 2, 29  # storage formats: plain, and fractal blocks


# -- whether it can run ------------------------------------------------------------------------------------------------


def why_not() -> str | None:
    """None where the operators answer, else the reason in words: what is missing, and which versions are needed."""
    if find_spec("torch_npu") is None:
        return f"torch_npu is not installed; it takes {NEEDED}"
    return _why_not()


@cache
def _why_not() -> str | None:
    try:
        npu = _torch_npu()
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load ({_line(error)}); install {NEEDED}, and source CANN's set_env.sh"
    if not npu.npu.is_available():
        return "torch_npu sees no NPU; `npu-smi info` must list one, and ASCEND_RT_VISIBLE_DEVICES must not hide it"
    if _older():
        return _older()
    missing = [name for name in OPERATORS if not hasattr(npu, name)]
    if missing:
        return f"torch_npu {npu.__version__} has no {', '.join(missing)}; it takes {NEEDED}"
    return _refusal("ocp", matmuls=True)


@cache
def _older() -> str | None:
    """Why the reference has to answer on this device, which is there: it is no A5. What an A5 lacks is an error instead."""
    device = _torch_npu().npu.get_device_name(0)
    return None if device.startswith(DEVICES) else f"{device} has no MX operators; they are those of Ascend 950 (A5)"


def _refusal(rule: str, matmuls: bool) -> str | None:
    """What operators say to 64 numbers: only calling them tells whether this CANN has their kernels."""
    x = torch.ones(1, 64, dtype=torch.bfloat16, device="npu")
    try:
        codes, pairs = _mx_quant(x, "mxfp4", rule, "rint")
        if matmuls:
            _mx_matmul(codes, pairs, codes, pairs, None, "mxfp4", "mxfp4", x.dtype)
            codes, l0, pairs = _dual_quant(x, None, "rint")
            _dual_matmul(codes, l0, pairs, codes, l0, pairs, None, x.dtype)
    except RuntimeError as error:
        return f"CANN {_cann()} does not run the operators ({_line(error)}); it takes {NEEDED}"
    return None


def rejects(scheme: str, k: int, n: int) -> str | None:
    """None, or the reason why a layer of this shape is refused."""
    if max(k, n) > _LARGEST:
        return f"N={n}, K={k}: npu_quant_matmul takes up to {_LARGEST} features on either side"
    if scheme == "w4a4" and k <= 2:
        return f"K={k}: npu_quant_matmul takes FP4 of more than 2 features"
    if scheme == "w4a8" and k % 64:
        return f"K={k}: npu_quant_matmul takes FP8 activations over FP4 weights in multiples of 64 features"
    return None


def about() -> str:
    """Device and versions, and what the reference computes there."""
    npu = _torch_npu()
    text = f"{npu.npu.get_device_name(0)}, torch_npu {npu.__version__}, CANN {_cann()}; by the reference: W4A16, W8A16, W4A8 of dual scales"
    reason = _refusal("uos", matmuls=False)
    return f"{text}; without the scale rule uos, mxfp4's default: {reason}" if reason else text


def _torch_npu() -> Any:
    return import_module("torch_npu")


def _operator(name: str) -> Callable[..., Any]:
    operator = getattr(_torch_npu(), name, None)
    if operator is None:
        raise BackendError(
            f"torch_npu has no {name}",
            where="mxdit on npu",
            got=f"torch_npu {_torch_npu().__version__}",
            expected=NEEDED,
        )
    return operator


def _cann() -> str:
    return _torch_npu().utils.get_cann_version()


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


# -- the ops -----------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """`mxdit.ops.quantize`."""
    if _older():
        return _refer("mxdit::quantize", quantize_ops.quantize, x, fmt, rule, round_mode)
    codes, scale = quantize_ops.prepare_quantize(x, fmt, rule, round_mode)
    if not x.numel():
        return codes, scale
    found, pairs = _mx_quant(x.reshape(-1, x.shape[-1]), fmt, rule, round_mode)
    return found.view(codes.shape), _unpaired(pairs, scale.shape)


def quantize_dual(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """`mxdit.ops.quantize_dual`."""
    if _older():
        return _refer("mxdit::quantize_dual", quantize_ops.quantize_dual, x, mul_scale, round_mode)
    codes, l0, l1 = quantize_ops.prepare_quantize_dual(x, mul_scale, round_mode)
    if not x.numel():
        return codes, l0, l1
    found, coarse, pairs = _dual_quant(x.reshape(-1, x.shape[-1]), mul_scale, round_mode)
    return found.view(codes.shape), coarse.view(l0.shape), _unpaired(pairs, l1.shape)


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
    if _older():
        return _refer("mxdit::matmul", products.matmul, a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    result = products.prepare_matmul(a, a_scale, w, w_scale, bias, a_fmt, w_fmt, out)
    scheme = "w8a8" if w_fmt == "mxfp8" else "w4a4" if a_fmt == "mxfp4" else "w4a8"
    _check_shape(scheme, w.shape[1] * FORMATS[w_fmt].per_byte, w.shape[0])
    if not result.numel():
        return result
    rows, pairs = a.reshape(-1, a.shape[-1]), _paired(a_scale.reshape(-1, a_scale.shape[-1]))
    return _mx_matmul(rows, pairs, w, _paired(w_scale), bias, a_fmt, w_fmt, out).view(result.shape)


def matmul_dual(
    a: Tensor, w: Tensor, a_l0: Tensor, w_l0: Tensor, a_l1: Tensor, w_l1: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """`mxdit.ops.matmul_dual`."""
    if _older():
        return _refer("mxdit::matmul_dual", products.matmul_dual, a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    result = products.prepare_matmul_dual(a, w, a_l0, w_l0, a_l1, w_l1, bias, out)
    _check_shape("w4a4", w.shape[1] * 2, w.shape[0])
    if not result.numel():
        return result
    rows, coarse, fine = (part.reshape(-1, part.shape[-1]) for part in (a, a_l0, a_l1))
    return _dual_matmul(rows, coarse, _paired(fine), w, w_l0, _paired(w_l1), bias, out).view(result.shape)


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
    """`mxdit.ops.linear`; reads every layout."""
    row, activation = products.check_linear(x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, layout)
    weight, shape = row.name, (*x.shape[:-1], w.shape[0])
    if _older() or (scheme, weight) in _NO_OPERATOR:
        w = unpack_nz(w) if layout == "nz" else w
        args = (x, w, w_scale, w_dual, mul_scale, bias, scheme, rule, "packed")
        return _refer(f"{scheme} over {weight}", products.linear, *args)
    _check_shape(scheme, x.shape[-1], w.shape[0])
    if not x.numel():
        return x.new_empty(shape)
    rows, pairs = x.reshape(-1, x.shape[-1]), _paired(w_scale)
    if w_dual is not None:
        codes, l0, l1 = _dual_quant(rows, mul_scale, "rint")
        return _dual_matmul(codes, l0, l1, w, w_dual, pairs, bias, x.dtype).view(shape)
    assert activation is not None
    if mul_scale is not None:  # npu_dynamic_mx_quant takes none
        rows = rows * mul_scale.to(rows.dtype)
    codes, scale = _mx_quant(rows, activation, rule, "rint")
    return _mx_matmul(codes, scale, w, pairs, bias, activation, weight, x.dtype).view(shape)


# -- the operators -----------------------------------------------------------------------------------------------------


def _mx_quant(x: Tensor, fmt: str, rule: str, round_mode: str) -> tuple[Tensor, Tensor]:
    """(M, K) to codes (M, K/2) or (M, K), and scales in pairs (M, ceil(K/64), 2), uint8."""
    if x.dtype is torch.float32 and x.shape[1] < FORMATS[fmt].block:
        raise BackendError(
            "npu_dynamic_mx_quant takes no such short rows of FP32",
            where="mxdit::quantize",
            got=f"K={x.shape[1]}",
            expected=f"K of {FORMATS[fmt].block} or more",
            hint="Cast to torch.bfloat16, or pad K with zeros.",
        )
    npu = _torch_npu()
    element = npu.float4_e2m1fn_x2 if fmt == "mxfp4" else npu.float8_e4m3fn
    codes, pairs = _operator("npu_dynamic_mx_quant")(
        x, axis=-1, round_mode=round_mode, dst_type=element, block_size=FORMATS[fmt].block, **_RULES[rule]
    )
    return codes.view(torch.uint8), pairs


def _dual_quant(x: Tensor, mul_scale: Tensor | None, round_mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) to codes (M, K/2) uint8, level 0 (M, ceil(K/512)) fp32 and level 1 in pairs (M, ceil(K/64), 2) uint8."""
    smooth = None if mul_scale is None else mul_scale.to(x.dtype)
    return _operator("npu_dynamic_dual_level_mx_quant")(x, smooth_scale=smooth, round_mode=round_mode)


def _mx_matmul(
    a: Tensor,
    a_pairs: Tensor,
    w: Tensor,
    w_pairs: Tensor,
    bias: Tensor | None,
    a_fmt: str,
    w_fmt: str,
    out: torch.dtype,
) -> Tensor:
    """Codes (M, K) times codes (N, K), uint8, scales in pairs: (M, N) in ``out``."""
    npu = _torch_npu()
    packed: dict[str, Any] = {}  # which uint8 operands hold pairs of FP4: torch's own FP8 dtype says so itself
    a, w = _dense(a), _dense(w)
    if a_fmt == "mxfp4":
        packed["x1_dtype"] = npu.float4_e2m1fn_x2
    else:
        a = a.view(torch.float8_e4m3fn)
    if w_fmt == "mxfp4":
        packed["x2_dtype"] = npu.float4_e2m1fn_x2
    else:
        w = w.view(torch.float8_e4m3fn)
    mixed = a_fmt != w_fmt
    if bias is not None:
        bias = bias.to(torch.bfloat16).reshape(1, -1) if mixed else bias.to(torch.float32)
    product = _operator("npu_quant_matmul")(
        a,
        w.transpose(0, 1),
        w_pairs.transpose(0, 1),
        pertoken_scale=a_pairs,
        bias=bias,
        output_dtype=torch.bfloat16 if mixed else out,
        scale_dtype=npu.float8_e8m0fnu,
        pertoken_scale_dtype=npu.float8_e8m0fnu,
        group_sizes=[0, 0, 32] if mixed else [1, 1, 32],
        **packed,
    )
    return product.to(out)


def _dual_matmul(
    a: Tensor,
    a_l0: Tensor,
    a_pairs: Tensor,
    w: Tensor,
    w_l0: Tensor,
    w_pairs: Tensor,
    bias: Tensor | None,
    out: torch.dtype,
) -> Tensor:
    """Codes (M, K/2) times codes (N, K/2), plain or in fractal blocks, with both levels of scales: (M, N) in ``out``."""
    return _operator("npu_dual_level_quant_matmul")(
        _dense(a),
        pack_nz(w),
        _dense(a_l0),
        w_l0.transpose(0, 1).contiguous(),
        a_pairs,
        w_pairs,
        bias=None if bias is None else bias.to(torch.float32),
        output_dtype=out,
    )


def pack_nz(w: Tensor) -> Tensor:
    """Codes (N, K/2) uint8 in fractal blocks, int8; what lies so already is returned as it is."""
    npu = _torch_npu()
    if npu.get_npu_format(w) == _NZ:
        return w
    return _operator("npu_format_cast")(_dense(w).view(torch.int8), _NZ, customize_dtype=torch.int8)


def unpack_nz(w: Tensor) -> Tensor:
    """The inverse of `pack_nz`, also of a tensor whose blocks were undone on its way to another device."""
    npu = _torch_npu()
    if w.device.type == "npu" and npu.get_npu_format(w) == _NZ:
        w = _operator("npu_format_cast")(w, _ND, customize_dtype=torch.int8)
    return w.view(torch.uint8)


# -- shared ------------------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """x with the strides of its shape. A single row is contiguous with whatever stride it was cut out with, and the operators
    tell by strides whether a matrix is transposed."""
    return x.contiguous().flatten().view(x.shape)


def _paired(scale: Tensor) -> Tensor:
    """(rows, blocks) as (rows, ceil(blocks/2), 2), an odd count filled with a zero byte."""
    if scale.shape[1] % 2:
        scale = F.pad(scale, (0, 1))
    return _dense(scale).view(scale.shape[0], -1, 2)


def _unpaired(pairs: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_paired`, in a canonical shape (..., blocks)."""
    return pairs.flatten(1)[:, : shape[-1]].contiguous().view(shape)


def _check_shape(scheme: str, k: int, n: int) -> None:
    reason = rejects(scheme, k, n)
    if reason:
        raise BackendError(
            "no operator takes a layer of this shape",
            where="mxdit::linear on npu",
            got=reason,
            hint="Keep the layer in BF16: name it in ignored_layers.",
        )


def _refer(what: str, op: Callable[..., _T], *args: object) -> _T:
    """What the reference says, in IEEE fp32, and a word in the log that it was the reference."""
    _warn(what, _older() or "no operator computes it")
    with _ieee_fp32():
        return op(*args)


@cache
def _warn(what: str, reason: str) -> None:
    logger.warning("npu: the reference, plain torch, computes %s: %s", what, reason)


@contextmanager
def _ieee_fp32() -> Iterator[None]:
    """No HF32 in fp32 matmuls, whatever the program around has set; see `mxdit.numerics.reference`."""
    matmul = getattr(_torch_npu().npu, "matmul", None)
    if matmul is None or not matmul.allow_hf32:
        yield
        return
    matmul.allow_hf32 = False
    try:
        yield
    finally:
        matmul.allow_hf32 = True


BACKEND = Backend(
    name="ascend (torch_npu)",
    device="npu",
    why_not=why_not,
    rejects=rejects,
    about=about,
    layouts={_DUAL: Layout("nz", pack_nz, unpack_nz)},
)


def register() -> None:
    """Let these kernels answer on NPU tensors, whose device torch calls PrivateUse1 until torch_npu names it."""
    implement("PrivateUse1", sys.modules[__name__])


if find_spec("torch_npu") is not None:  # another vendor's device may be PrivateUse1 where it is not
    register()
