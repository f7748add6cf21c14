"""The MX operators of torch_npu on an Ascend 950, as the vendor's documents and sources have them.

Each checks every argument first, for what the device would refuse or misread, and then computes what docs/numerics.md
says, with mxdit's codec and reference. What the device can do and this emulation cannot is a NotImplementedError.

Sources, by the tags of docs/numerics-sources.md, and two more: CAST is hicann/ops-math math/cast/docs/aclnnCast.md,
FMT is conversion/npu_format_cast of the same repository with Ascend/pytorch torch_npu/csrc/aten/common/
FormatCastKernelNpu.cpp. Signatures are those of TN's npu_native_functions_by_codegen.yaml.

Where they disagree:
    * npu_format_cast: op-plugin's page says that an Ascend 950 takes no customize_dtype; its own test of the dual-level
      matmul, VO, FMT's source and FMT's table for the 950 all pass one. It is taken.
    * npu_dtype_cast: op-plugin's page lists no Ascend 950 and knows torch dtypes only; TN's schema and VO cast to
      float4_e2m1fn_x2 there, and CAST has the table. It is taken.
    * The same page and test give customize_dtype by position, TN's schema by keyword only: by keyword only.
    * smooth_scale: op-plugin's page says that it is not supported yet; the kernel and VO use it. It is taken.
    * npu_quant_matmul: op-plugin's test packs FP4 into int8, its page and TN into uint8: one byte is one byte.
      The tests give no group_sizes, DOC-V5 wants [1, 1, 32] and lets zeros be inferred: none, or exactly those.
      K of W4A8 is a multiple of 64 in TN, of 8 in DOC-V5 and the kernel's check: 64, the stricter. DOC-V5 forbids empty
      tensors, and returns an empty result for M = 0 in the next paragraph: refused, as TN does.
    * The last axes of x1 and x2 are at most 65535 in TN, which does not say of what: K and N in elements, the stricter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from npu_device import FORMAT_NCHW, FORMAT_ND, FORMAT_NZ, NpuTensor, from_nz, state, to_nz
from torch import Tensor

import mxdit
import oracle
from mxdit.numerics import reference

# TN meta l.34-70: what torch has no dtype for, or had none for.
INT4, HIFLOAT8, FLOAT8_E5M2, FLOAT8_E4M3FN, FLOAT8_E8M0FNU, FLOAT4_E2M1, FLOAT4_E1M2 = 285, 290, 291, 292, 293, 296, 297
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    15: torch.bfloat16,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    FLOAT8_E5M2: torch.float8_e5m2,
    FLOAT8_E4M3FN: torch.float8_e4m3fn,
}
_CUSTOM = {torch.float4_e2m1fn_x2: FLOAT4_E2M1, torch.float8_e8m0fnu: FLOAT8_E8M0FNU}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
_ROUND_MODES = ("rint", "round", "floor")
_LONGEST = 65535

OPERATORS: dict[str, Callable[..., Any]] = {}


# -- what every operator checks ----------------------------------------------------------------------------------------


class _Contract:
    """What an operator asks of its arguments: called with a condition, it raises as the device would if it is false."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, holds: bool, argument: str, got: Any, wanted: Any) -> None:
        if not holds:
            raise RuntimeError(f"{self.name}: {argument} is {got}, but must be {wanted}")

    def kernel(self, kernel: str) -> None:
        """Devices and CANNs that have not got the kernel are refused."""
        if not is_950():
            raise RuntimeError(f"{self.name}: call {kernel} failed, 361001: {state.name} is not supported")
        if kernel in state.no_kernel:
            raise RuntimeError(f"{kernel} or {kernel}GetWorkspaceSize not in libopapi.so, or libopapi.so not found.")

    def nd(self, /, **tensors: Any) -> None:
        for argument, x in tensors.items():
            self(x is None or x.npu_format == FORMAT_ND, argument, "FRACTAL_NZ", "ND")

    def full(self, /, **tensors: Any) -> None:
        for argument, x in tensors.items():
            self(x is None or x.numel() > 0, argument, f"empty, {_shape(x)}", "not empty")

    def contiguous(self, /, **tensors: Any) -> None:
        for argument, x in tensors.items():
            self(x is None or x.is_contiguous(), argument, "not contiguous", "contiguous")


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Log the call, and refuse tensors that are not on the device."""
    want, signature = _Contract(function.__name__), inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        state.calls.append((want.name, {key: _summary(value) for key, value in bound.arguments.items()}))
        for key, value in bound.arguments.items():
            if isinstance(value, Tensor):
                want(isinstance(value, NpuTensor), key, f"on {value.device}", "on an NPU")
        return function(*args, **kwargs)

    OPERATORS[want.name] = call
    return call


def _summary(value: Any) -> Any:
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value


def is_950() -> bool:
    """Whether the device is an Ascend 950; older documents call it 910_95."""
    return state.name.startswith(("Ascend950", "Ascend910_95"))


def _dtype(value: Any) -> Any:
    """An ``int`` argument that names a dtype: a torch dtype where there is one, else torch_npu's number."""
    if isinstance(value, torch.dtype):
        return _CUSTOM.get(value, value)
    return _DTYPES.get(value, value)


def _shape(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


def _paired(scale: Tensor) -> Tensor:
    """(..., ceil(K/32)) scales as the operators give and take them: (..., ceil(K/64), 2), byte 0 behind an odd one."""
    return torch.nn.functional.pad(scale, (0, scale.shape[-1] % 2)).unflatten(-1, (-1, 2)).contiguous()


def _unpaired(want: _Contract, argument: str, pairs: Tensor, k: int) -> Tensor:
    """The inverse. The pad is documented to be 0, so something else there is scales that are not laid out as these."""
    blocks = -(-k // 32)
    flat = pairs.flatten(-2)
    pad = flat[..., blocks:]
    want(not bool(pad.any()), f"{argument}'s pad", pad.flatten()[:4].tolist(), f"0 behind {blocks} scales a row")
    return flat[..., :blocks].contiguous()


# -- quantizers --------------------------------------------------------------------------------------------------------


@_operator
def npu_dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: Any = FLOAT4_E2M1,
    block_size: int = 32,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """TN _op_plugin_docs l.17167, DOC-V3, DynamicMxQuant's tiling (GetAttr, CheckShape), numerics section 2."""
    want = _Contract("npu_dynamic_mx_quant")
    kernel = next((k for k in ("aclnnDynamicMxQuantV3", "aclnnDynamicMxQuantV2") if k not in state.no_kernel), None)
    want.kernel(kernel or "aclnnDynamicMxQuant")
    want.nd(input=input)
    dst, alg = _dtype(dst_type), scale_alg or 0
    fp8, fp4 = dst in (torch.float8_e4m3fn, torch.float8_e5m2), dst in (FLOAT4_E2M1, FLOAT4_E1M2)
    algorithms = (0, 1) if fp8 else (0, 2) if dst == FLOAT4_E2M1 else (0,)
    modes = ("rint",) if fp8 else _ROUND_MODES
    want(input.dtype in _FLOATS, "input", input.dtype, f"one of {_FLOATS}")
    want(1 <= input.dim() <= 7, "input", f"{input.dim()}-D", "1-D to 7-D")
    want(-input.dim() <= axis < input.dim(), "axis", axis, f"an axis of {_shape(input)}")
    want(fp8 or fp4, "dst_type", dst_type, "291, 292, 296 or 297")
    want(not fp4 or input.shape[-1] % 2 == 0, "input's last axis", input.shape[-1], "even")
    want(round_mode in modes, "round_mode", repr(round_mode), f"one of {modes}")
    want(0 < block_size <= 1024 and block_size % 32 == 0, "block_size", block_size, "32, 64, .. 1024")
    want(alg in algorithms, "scale_alg", alg, f"one of {algorithms} for dst_type {dst_type}")
    want(alg != 2 or block_size == 32, "block_size", block_size, "32 with scale_alg 2")
    in_range = dst_type_max == 0 or 6 <= dst_type_max <= 12
    want(in_range, "dst_type_max", dst_type_max, "0.0, or from 6.0 to 12.0")
    for_max = dst_type_max == 0 or (dst == FLOAT4_E2M1 and block_size == 32)
    want(for_max, "dst_type_max", dst_type_max, "0.0 unless dst_type is float4_e2m1fn_x2, block 32")
    want(max_low_bound >= 0, "max_low_bound", max_low_bound, "0 or above")
    want(alg == 1 or max_low_bound == 0, "max_low_bound", max_low_bound, "0.0 unless scale_alg is 1")
    if input.dtype is torch.float32:
        want(block_size == 32, "block_size", block_size, "32 for a float32 input")
        want(input.shape[axis] >= 32, "input's axis", input.shape[axis], "32 or above in float32")
    want.full(input=input)  # the tiling divides by the work there is and refuses to divide by zero
    # TN: "without aclnnDynamicMxQuantV3, max_low_bound has no effect and scale_alg cannot be 2".
    want(alg != 2 or kernel == "aclnnDynamicMxQuantV3", "scale_alg", 2, f"0 or 1 for {kernel}")
    rules = {1: "cublas"} if fp8 else {2: {0.0: "even6", 6.0: "even6", 7.0: "even7", 7.25: "uos"}.get(dst_type_max)}
    rule = {0: "ocp", **rules}[alg]
    if (
        axis not in (-1, input.dim() - 1)
        or block_size != 32
        or max_low_bound
        or rule is None
        or dst not in (torch.float8_e4m3fn, FLOAT4_E2M1)
    ):
        raise NotImplementedError(
            f"{want.name}: the emulation has only the last axis in blocks of 32, and mxdit's rules"
        )
    packed = mxdit.encode(input.raw, "mxfp8" if fp8 else "mxfp4", rule, round_mode)
    codes = packed.codes.view(torch.float8_e4m3fn) if fp8 else packed.codes
    return NpuTensor(codes), NpuTensor(_paired(packed.scale))


@_operator
def npu_dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    """quant/dynamic_dual_level_mx_quant docs and op_host tiling (CheckSmoothScaleDtypeShape), numerics section 3."""
    want = _Contract("npu_dynamic_dual_level_mx_quant")
    want.kernel("aclnnDynamicDualLevelMxQuant")
    want.nd(input=input, smooth_scale=smooth_scale)
    want(input.dtype in _HALVES, "input", input.dtype, f"one of {_HALVES}")
    want(1 <= input.dim() <= 7, "input", f"{input.dim()}-D", "1-D to 7-D")
    want.full(input=input)
    k = input.shape[-1]
    want(k % 2 == 0, "input's last axis", k, "even")
    want(round_mode in _ROUND_MODES, "round_mode", repr(round_mode), f"one of {_ROUND_MODES}")
    if smooth_scale is not None:
        want(smooth_scale.dtype is input.dtype, "smooth_scale", smooth_scale.dtype, f"{input.dtype} as input is")
        want(smooth_scale.shape == (k,), "smooth_scale", _shape(smooth_scale), (k,))
    smooth = None if smooth_scale is None else smooth_scale.raw
    packed = mxdit.encode(input.raw, "mxfp4_dualscale", round_mode=round_mode, mul_scale=smooth)
    return NpuTensor(packed.codes), NpuTensor(packed.outer), NpuTensor(_paired(packed.scale))


# -- matmuls -----------------------------------------------------------------------------------------------------------


@_operator
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    x1_dtype: Any = None,
    x2_dtype: Any = None,
    pertoken_scale_dtype: Any = None,
    scale_dtype: Any = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """The MX modes of DOC-V5 ("MX quantization"), OPP QuantMatmulKernelNpuOpApi.cpp, TN meta l.4023-4590,
    quant_batch_matmul_v3_checker.cpp (Mx*), aclnn_quant_matmul_v5.cpp (A8W4), numerics sections 4.1, 4.2 and 9."""
    want = _Contract("npu_quant_matmul")
    if is_950() and "aclnnQuantMatmulV5" in state.no_kernel:
        raise RuntimeError("Get aclnnQuantMatmulV5 or aclnnQuantMatmulV5GetWorkspaceSize failed, please upgrade CANN.")
    left = _operand(want, "x1", x1, x1_dtype)
    right = _operand(want, "x2", x2, x2_dtype)
    mixed = (left, right) == ("mxfp8", "mxfp4")
    mx_scales = _is_e8m0(want, "scale", scale, scale_dtype) and pertoken_scale is not None
    mx_scales = mx_scales and _is_e8m0(want, "pertoken_scale", pertoken_scale, pertoken_scale_dtype)
    if not mx_scales or not (mixed or left == right is not None):
        raise RuntimeError(
            f"{want.name}: not an MX mode: x1 {left or x1.dtype}, x2 {right or x2.dtype}, scale {scale.dtype}, "
            f"pertoken_scale {pertoken_scale is not None and pertoken_scale.dtype}; wanted FP4 x FP4, FP8 x FP8 or "
            "FP8 x FP4 with float8_e8m0fnu scales (x1_dtype and x2_dtype name packed FP4, scale_dtype and "
            "pertoken_scale_dtype name scales in bytes)"
        )
    want.kernel("aclnnQuantMatmulV5")
    want.nd(x1=x1, scale=scale, pertoken_scale=pertoken_scale, bias=bias)
    want.nd(x2=x2)  # DOC-V5, note on the 950; newer sources have aclnnQuantMatmulWeightNz
    want(offset is None and y_scale is None, "offset or y_scale", "given", "left out in MX modes")
    want.full(x1=x1, x2=x2, scale=scale, pertoken_scale=pertoken_scale, bias=bias)

    # Layouts: x1 (..., M, K) and x2 (K, N), plain or as transposed views of the plain ones.
    want(2 <= x1.dim() <= 6, "x1", f"{x1.dim()}-D", "2-D to 6-D")
    want(2 <= x2.dim() <= 6, "x2", f"{x2.dim()}-D", "2-D to 6-D")
    turned_1, turned_2 = _transposed(x1), _transposed(x2)
    whole = "contiguous, or such a one with its last axes swapped"
    want(turned_1 or x1.is_contiguous(), "x1", f"strided {x1.stride()}", whole)
    want(turned_2 or x2.is_contiguous(), "x2", f"strided {x2.stride()}", whole)
    if mixed:
        want(not turned_1 and x1.dim() == 2, "x1", "transposed or a batch", "(M, K) with FP4 weights")
        want(turned_2, "x2", f"{_shape(x2)}, not transposed", "(N, K) transposed, with FP8 x1")
    for x, its, first, what in (
        (x1, pertoken_scale, x1.dim() - 2, "x1 and pertoken_scale"),
        (x2, scale, 0, "x2 and scale"),
    ):
        want(its.dim() == x.dim() + 1, what, f"{x.dim()}-D and {its.dim()}-D", "one axis more in scales")
        same = _same_transpose(x, its, first, its.dim() - 3)
        want(same, f"the transpose of {what}", f"not the same, strides {x.stride()} and {its.stride()}", "the same")
    if turned_1 or x2.dim() != 2:
        raise NotImplementedError(f"{want.name}: the emulation has no transposed x1 and no batches of x2")

    # Shapes. FP4 is packed along the axis that lies last in memory.
    k = x1.shape[-1] * _per_byte(left)
    k2, n = x2.shape[0] * _per_byte(right) ** turned_2, x2.shape[1] * _per_byte(right) ** (not turned_2)
    want(k == k2, "K of x1 and x2", f"{k} and {k2}", "the same")
    want(max(k, n) <= _LONGEST, "K or N", max(k, n), f"at most {_LONGEST}")
    want(k > 2 or left == "mxfp8", "K", k, "above 2 in FP4")
    want(not mixed or k % 64 == 0, "K", k, "a multiple of 64 in FP8 x FP4")
    pairs = -(-k // 64)
    for argument, x, shape in (
        ("pertoken_scale", pertoken_scale, (*x1.shape[:-1], pairs, 2)),
        ("scale", scale, (pairs, n, 2)),
    ):
        want(_shape(x) == shape, argument, _shape(x), shape)
    if right == "mxfp4" and not turned_2:
        raise NotImplementedError(f"{want.name}: the emulation has no FP4 packed along N")

    # Groups, result and bias.
    groups = None if group_sizes is None else list(group_sizes)
    allowed = ([0, 0, 32], [1, 1, 32]) if mixed else ([1, 1, 32], None)
    want(groups in allowed, "group_sizes", groups, f"one of {allowed}")
    out, outputs = _dtype(output_dtype), _HALVES if mixed else _FLOATS
    want(out in outputs, "output_dtype", f"{output_dtype}", f"one of {outputs} (None means int8)")
    if bias is not None:
        shape, dtype = ((1, n), out) if mixed else ((n,), torch.float32)
        want(_shape(bias) == shape, "bias", _shape(bias), shape)
        want(bias.dtype is dtype, "bias", bias.dtype, dtype)
        want.contiguous(bias=bias)

    a_scale = _unpaired(want, "pertoken_scale", _bytes(pertoken_scale), k).flatten(0, -2)
    w_scale = _unpaired(want, "scale", _bytes(scale).transpose(0, 1), k)
    a = reference.packed_rows(_bytes(x1).flatten(0, -2), a_scale, left)
    w = reference.packed_rows(_bytes(x2).T.contiguous(), w_scale, right)
    result = torch.empty(a_scale.shape[0], n, dtype=out)
    reference.matmul(a, w, k, None if bias is None else bias.raw.flatten().float(), result)
    return NpuTensor(result.view(*x1.shape[:-1], n))


def _operand(want: _Contract, argument: str, x: Tensor, dtype: Any) -> str | None:
    """mxdit's name for the format of an operand, or None. Dtypes are named for bytes only (TN, meta,
    quant_matmul_extra_dtype_check)."""
    dtype = _dtype(dtype)
    if dtype is not None:
        native = "Pass it only when the tensor is not of a native PyTorch dtype"
        want(dtype in (FLOAT4_E2M1, HIFLOAT8), f"{argument}_dtype", dtype, f"float4_e2m1fn_x2. {native}")
        want(x.element_size() == 1, argument, x.dtype, f"of one byte, as {argument}_dtype is given")
        want(not x.dtype.is_floating_point or x.dtype in _CUSTOM, f"{argument}_dtype", dtype, f"left out. {native}")
        return "mxfp4" if dtype == FLOAT4_E2M1 else None
    if x.dtype is torch.float8_e5m2:
        raise NotImplementedError(f"{want.name}: the emulation has no float8_e5m2")
    return {torch.float8_e4m3fn: "mxfp8", torch.float4_e2m1fn_x2: "mxfp4"}.get(x.dtype)


def _is_e8m0(want: _Contract, argument: str, x: Tensor, dtype: Any) -> bool:
    if dtype is None:
        return x.dtype is torch.float8_e8m0fnu
    want(_dtype(dtype) == FLOAT8_E8M0FNU, f"{argument}_dtype", dtype, "float8_e8m0fnu")
    want(x.dtype in (torch.uint8, torch.int8, torch.float8_e8m0fnu), argument, x.dtype, "bytes")
    return True


def _per_byte(fmt: str) -> int:
    return 2 if fmt == "mxfp4" else 1


def _bytes(x: Tensor) -> Tensor:
    return x.raw.view(torch.uint8)


def _transposed(x: Tensor) -> bool:
    """OPP is_transpose_last_two_dims: the view of a contiguous tensor with its last two axes swapped."""
    rows, columns = x.shape[-2:]
    swapped = x.transpose(-1, -2)
    return x.stride(-2) == 1 and x.stride(-1) == rows and swapped.is_contiguous() and (rows, columns) != (1, 1)


def _same_transpose(x: Tensor, scale: Tensor, first: int, scale_first: int) -> bool:
    """OPP is_x_scale_same_transpose: x and its scales are turned alike, by their strides; sizes of one say nothing."""

    def turned(y: Tensor, axis: int) -> bool:
        return y.stride(axis + 1) == y.stride(axis) * y.shape[axis]

    sizes = x.shape[first : first + 2], scale.shape[scale_first : scale_first + 2]
    return (1, 1) in sizes or turned(x, first) == turned(scale, scale_first)


@_operator
def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: Any = 15,
) -> Tensor:
    """OPP DualLevelQuantMatmulKernelNpuOpApi.cpp, aclnn_dual_level_quant_matmul.cpp (CheckTensor*), its
    op_tiling checker (CheckInputs), numerics section 4.3."""
    want = _Contract("npu_dual_level_quant_matmul")
    if not is_950():
        raise RuntimeError(f"{want.name}: This interface is supported only on the Ascend950 platform and after.")
    want.kernel("aclnnDualLevelQuantMatmulWeightNz")
    scales = {
        "x1_level0_scale": x1_level0_scale,
        "x2_level0_scale": x2_level0_scale,
        "x1_level1_scale": x1_level1_scale,
        "x2_level1_scale": x2_level1_scale,
    }
    want(x1.dim() == 2, "x1", _shape(x1), "2-D, (M, K/2)")
    want(x2.dim() == 2, "x2", _shape(x2), "2-D, (N, K/2)")
    want(x2.npu_format == FORMAT_NZ, "x2", "ND", "FRACTAL_NZ")
    want.nd(x1=x1, bias=bias, **scales)
    want(x1.dtype in (torch.uint8, torch.int8), "x1", x1.dtype, "bytes of packed FP4")
    want(x2.dtype is torch.int8, "x2", x2.dtype, torch.int8)
    want.contiguous(x1=x1, x2=x2, bias=bias, **scales)
    want.full(x1=x1, x2=x2, bias=bias, **scales)
    m, n, k = x1.shape[0], x2.shape[0], x1.shape[1] * 2
    want(x2.shape[1] * 2 == k, "K of x1 and x2", f"{k} and {x2.shape[1] * 2}", "the same")
    groups, pairs = -(-k // 512), -(-k // 64)
    shapes = {
        "x1_level0_scale": (m, groups),
        "x2_level0_scale": (groups, n),
        "x1_level1_scale": (m, pairs, 2),
        "x2_level1_scale": (n, pairs, 2),
    }
    for argument, x in scales.items():
        dtype = torch.float32 if "level0" in argument else torch.uint8
        want(x.dtype is dtype, argument, x.dtype, dtype)
        want(_shape(x) == shapes[argument], argument, _shape(x), shapes[argument])
    if bias is not None:
        want(bias.dtype is torch.float32, "bias", bias.dtype, torch.float32)
        want(_shape(bias) == (n,), "bias", _shape(bias), (n,))
    out = _dtype(output_dtype)
    want(out in _HALVES, "output_dtype", f"{output_dtype}", f"one of {_HALVES}")

    a = reference.packed_rows(_bytes(x1), _unpaired(want, "x1_level1_scale", x1_level1_scale.raw, k), "mxfp4_dualscale")
    w_codes = from_nz(x2).view(torch.uint8)
    w = reference.packed_rows(w_codes, _unpaired(want, "x2_level1_scale", x2_level1_scale.raw, k), "mxfp4_dualscale")
    result = torch.empty(m, n, dtype=out)
    bias_raw = None if bias is None else bias.raw
    reference.matmul_groups(a, w, k, x1_level0_scale.raw, x2_level0_scale.raw.T, bias_raw, result)
    return NpuTensor(result)


# -- casts -------------------------------------------------------------------------------------------------------------


@_operator
def npu_format_cast(self: Tensor, acl_format: int, *, customize_dtype: Any = None, input_dtype: Any = None) -> Tensor:
    """FMT: its table for the 950, and Check95NdToNzCalculateSizeAndFormatInputs."""
    want = _Contract("npu_format_cast")
    want(acl_format in (FORMAT_ND, FORMAT_NZ), "acl_format", acl_format, "2 (ND) or 29 (FRACTAL_NZ) on a 950")
    if self.npu_format == acl_format:
        return self
    if not is_950() and customize_dtype is not None and tuple(map(int, state.cann.split(".")[:2])) < (9, 1):
        raise RuntimeError(f"{want.name}: customize_dtype is not supported by the current soc version.")
    if "aclnnNpuFormatCast" in state.no_kernel:
        raise RuntimeError("aclnnNpuFormatCast does not exist, Current soc version only support aclnn operators.")
    if acl_format == FORMAT_ND:
        return NpuTensor(from_nz(self))
    if input_dtype is not None and _dtype(input_dtype) in (FLOAT4_E2M1, FLOAT4_E1M2, INT4):
        raise RuntimeError(f"{want.name}: aclnnNpuFormatCast not support recovery format.")  # a byte holds two of them
    source = self.dtype if input_dtype is None else _dtype(input_dtype)
    c0 = source if customize_dtype is None else _dtype(customize_dtype)
    # uint8 is in the table from FRACTAL_NZ to ND only; int8 is what packed FP4 is viewed as.
    dtypes = (torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16)
    want(source in dtypes, "self", self.dtype, f"one of {dtypes}")
    want(c0 == source, "customize_dtype", f"{customize_dtype}", f"{source}, as self is")
    want(2 <= self.dim() <= 6, "self", f"{self.dim()}-D", "2-D to 6-D")
    want.full(self=self)
    want(source in dtypes[:2] or self.shape[-2] > 1, "self", _shape(self), "of more than one row in a 16-bit dtype")
    rows = self.raw.contiguous()
    return NpuTensor(to_nz(rows), FORMAT_NZ, rows)


@_operator
def npu_dtype_cast(self: Tensor, dtype: Any, input_dtype: Any = None) -> Tensor:
    """CAST's table for the 950, OPP CastKernelNpuOpApi.cpp. Numeric values are cast: bytes of packed FP4 only when
    input_dtype says that they are, and never to FP4 again."""
    want = _Contract("npu_dtype_cast")
    if "aclnnCast" in state.no_kernel:
        raise RuntimeError(
            "Current device only support aclnn operators, but aclnnCast or aclnnCastGetWorkspaceSize not found"
        )
    want.nd(self=self)
    target, source = _dtype(dtype), self.dtype if input_dtype is None else _dtype(input_dtype)
    source = _CUSTOM.get(source, source)
    eights = (torch.float8_e4m3fn, torch.float8_e5m2)
    small = (FLOAT4_E2M1, *eights)
    if target not in small and source not in small:
        want(isinstance(target, torch.dtype) and isinstance(source, torch.dtype), "dtype", dtype, "a dtype CAST has")
        return NpuTensor(self.raw.to(target))
    want(is_950(), "dtype", f"{dtype} from {source}", f"a dtype that {state.name} has")
    path = f"{source} to {dtype}"
    if target == FLOAT4_E2M1:
        want(source in (*_FLOATS, *eights), "self", path, "float numbers where FP4 is wanted, not bytes")
        want(self.dim() > 0 and self.shape[-1] % 2 == 0, "self's last axis", _shape(self), "even")
        codes = oracle.codes_of(self.raw.double().numpy(), oracle.E2M1, "rint")
        return NpuTensor(torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4))
    if source == FLOAT4_E2M1:
        want(target in (*_FLOATS, *eights), "dtype", path, "a float dtype")
        want.contiguous(self=self)
        codes = _bytes(self).numpy()
        values = np.concatenate([oracle.E2M1, -oracle.E2M1])[np.stack((codes & 15, codes >> 4), -1)]
        return NpuTensor(torch.from_numpy(values).flatten(-2).to(target))
    want((source in eights) != (target in eights) and {source, target} & set(_FLOATS), "dtype", path, "in CAST's table")
    if target is torch.float8_e4m3fn:
        return NpuTensor(self.raw.float().clamp(-448.0, 448.0).to(target))
    return NpuTensor(self.raw.to(target))


@_operator
def get_npu_format(self: Tensor) -> int:
    """FRACTAL_NZ, or a base format; four axes count as NCHW (op-plugin's page of npu_format_cast, first example)."""
    return FORMAT_NCHW if self.npu_format == FORMAT_ND and self.dim() == 4 else self.npu_format
