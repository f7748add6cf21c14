"""Mistakes that Ascend backends have shipped, or could: made in ours one at a time, each is refused or gives wrong numbers.

A mutant is the source of the backend with one piece of text replaced. The table says what catches it.
"""

from __future__ import annotations

import itertools
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mxdit
from mxdit.backends import ascend, native
from mxdit.numerics.formats import FORMATS, SCHEMES

# What is wrong, the text, what it is replaced by, and what catches it: the operator's refusal, or the numbers.
MUTANTS = [
    (
        "untransposed scale",
        "w_pairs.transpose(0, 1),",
        "w_pairs.transpose(0, 1).contiguous(),",
        "transpose of x2 and scale",
    ),
    ("scale as the weight lies", "w_pairs.transpose(0, 1),", "w_pairs,", "transpose of x2 and scale"),
    ("untransposed weight", "w.transpose(0, 1),\n        w_pairs", "w,\n        w_pairs", "transpose of x2 and scale"),
    (
        "packed weight cast again",
        "a, w = _dense(a), _dense(w)",
        "a, w = _dense(a), npu.npu_dtype_cast(w, npu.float4_e2m1fn_x2)",
        "float numbers .* not bytes",
    ),
    (
        "packed weight taken for FP4 values",
        "a, w = _dense(a), _dense(w)",
        "a, w = _dense(a), npu.npu_dtype_cast(w.to(torch.bfloat16), npu.float4_e2m1fn_x2)",
        "K of x1 and x2 is 1024 and 512",
    ),
    ("missing zero pad", "scale = F.pad(scale, (0, 1))", "scale = scale[:, :-1]", "scale is \\(17, 7, 2\\)"),
    ("pad that is not zero", "F.pad(scale, (0, 1))", "F.pad(scale, (0, 1), value=127)", "scale's pad"),
    ("pad in front", "F.pad(scale, (0, 1))", "F.pad(scale, (1, 0))", "scale's pad"),
    ("swapped level 0 and level 1", "_dense(a_l0),\n", "a_pairs,\n", "x1_level0_scale is torch.uint8"),
    (
        "swapped level 0 of the two sides",
        "        _dense(a_l0),\n        w_l0.transpose(0, 1).contiguous(),",
        "        _dense(w_l0),\n        a_l0.transpose(0, 1).contiguous(),",
        "numbers: w4a4 over mxfp4_dualscale",
    ),
    (
        "swapped level 1 of the two sides",
        "        a_pairs,\n        w_pairs,\n",
        "        w_pairs,\n        a_pairs,\n",
        "numbers: w4a4 over mxfp4_dualscale",
    ),
    (
        "untransposed level 0 of the weight",
        "w_l0.transpose(0, 1).contiguous()",
        "w_l0.contiguous()",
        "numbers: w4a4 over mxfp4_dualscale",
    ),
    (
        "level 0 as a view",
        "w_l0.transpose(0, 1).contiguous()",
        "w_l0.transpose(0, 1)",
        "x2_level0_scale is not contiguous",
    ),
    ("smooth vector in the wrong dtype", "mul_scale.to(x.dtype)", "mul_scale", "smooth_scale is torch.float32"),
    ("smooth vector dropped", "smooth_scale=smooth", "smooth_scale=None", "numbers: w4a4 over mxfp4_dualscale"),
    ("smooth product in FP32", "mul_scale.to(rows.dtype)", "mul_scale", "numbers: w4a4 over mxfp4"),
    ("smooth product dropped", "rows * mul_scale.to(rows.dtype)", "rows", "numbers: w4a4 over mxfp4"),
    (
        "smooth product over four bits alone",
        "if mul_scale is not None:  #",
        'if mul_scale is not None and scheme == "w4a4":  #',
        "numbers: w4a8 over mxfp4",
    ),
    (
        "bias in bf16",
        "if mixed else bias.to(torch.float32)",
        "if mixed else bias.to(torch.bfloat16)",
        "npu_quant_matmul: bias is torch.bfloat16",
    ),
    (
        "bias in bf16, dual level",
        "None if bias is None else bias.to(torch.float32)",
        "None if bias is None else bias.to(torch.bfloat16)",
        "npu_dual_level_quant_matmul: bias is torch.bfloat16",
    ),
    ("bias dropped", "        bias=bias,\n", "", "numbers: w4a4 over mxfp4"),
    (
        "bias of W4A8 in fp32",
        "bias.to(torch.bfloat16).reshape(1, -1) if mixed",
        "bias.to(torch.float32).reshape(1, -1) if mixed",
        "bias is torch.float32",
    ),
    (
        "bias of W4A8 with one axis",
        "bias.to(torch.bfloat16).reshape(1, -1) if mixed",
        "bias.to(torch.bfloat16) if mixed",
        "bias is \\(2,\\)",
    ),
    (
        "fp32 asked of the dual-level product",
        "output_dtype=out,\n    )",
        "output_dtype=torch.float32,\n    )",
        "output_dtype is torch.float32",
    ),
    ("result not cast back", "return product.to(out)", "return product", "dtype"),
    (
        "fp16 rounded by way of bf16",
        "output_dtype=torch.bfloat16 if mixed else out",
        "output_dtype=torch.bfloat16",
        "numbers: w4a4 over mxfp4",
    ),
    ("FP4 operand not named", 'packed["x1_dtype"] = npu.float4_e2m1fn_x2', "pass", "not an MX mode: x1 torch.uint8"),
    ("FP4 weight not named", 'packed["x2_dtype"] = npu.float4_e2m1fn_x2', "pass", "not an MX mode: .* x2 torch.uint8"),
    ("scale dtype not named", "        scale_dtype=npu.float8_e8m0fnu,\n", "", "not an MX mode: .* scale torch.uint8"),
    (
        "scale dtype of activations not named",
        "        pertoken_scale_dtype=npu.float8_e8m0fnu,\n",
        "",
        "pertoken_scale torch.uint8",
    ),
    ("group sizes of another mode", "[0, 0, 32] if mixed else [1, 1, 32]", "[1, 128, 128]", "group_sizes"),
    ("weight as rows in the dual-level product", "pack_nz(w),", "w.contiguous().view(torch.int8),", "x2 is ND"),
    (
        "fractal blocks of bytes that are not int8",
        ".view(torch.int8), _NZ",
        ", _NZ",
        "npu_format_cast: self is torch.uint8",
    ),
    (
        "uos without its maximum",
        '"uos": {"scale_alg": 2, "dst_type_max": 7.25}',
        '"uos": {"scale_alg": 2}',
        "numbers: w4a4 over mxfp4",
    ),
    (
        "uos by the OCP rule",
        '"uos": {"scale_alg": 2, "dst_type_max": 7.25}',
        '"uos": {"scale_alg": 0}',
        "numbers: w4a4 over mxfp4",
    ),
    (
        "cublas by the OCP rule",
        '"cublas": {"scale_alg": 1}',
        '"cublas": {"scale_alg": 0}',
        "numbers: mxfp8 cublas rint: codes",
    ),
    (
        "even6 as even7",
        '"even6": {"scale_alg": 2, "dst_type_max": 6.0}',
        '"even6": {"scale_alg": 2, "dst_type_max": 7.0}',
        "numbers: mxfp4 even6 rint: codes",
    ),
    (
        "rounding mode dropped",
        "round_mode=round_mode, dst_type",
        'round_mode="rint", dst_type',
        "numbers: mxfp4 ocp round: codes",
    ),
    (
        "rounding mode dropped, dual level",
        "round_mode=round_mode)",
        'round_mode="rint")',
        "numbers: mxfp4_dualscale ocp round: codes",
    ),
    (
        "pad byte left in the canonical scale",
        "[:, : shape[-1]]",
        "[:, -shape[-1] :]",
        "numbers: mxfp4 ocp rint: scales",
    ),
    (
        "FP8 codes asked for FP4",
        'npu.float4_e2m1fn_x2 if fmt == "mxfp4" else npu.float8_e4m3fn',
        "npu.float4_e2m1fn_x2",
        "K of x1 and x2",
    ),
    ("blocks of 64", "block_size=FORMATS[fmt].block", "block_size=64", "block_size is 64"),
    ("quantized along the tokens", "axis=-1", "axis=0", "only the last axis"),
    (
        "rule of another format",
        "_mx_quant(rows, activation, rule,",
        '_mx_quant(rows, activation, "ocp",',
        "numbers: w4a4 over mxfp4",
    ),
]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("npu")]


def mutant(old: str, new: str) -> Any:
    """The backend as a module of its own with a text replaced, not registered."""
    source = Path(ascend.__file__).read_text().partition("\nif find_spec(")[0]
    assert source.count(old) == 1, f"{source.count(old)} times in the backend: {old!r}"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), ascend.__file__, "exec"), vars(module))
    return module


def numbers(rows: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.exp2((torch.rand(rows, -(-k // 32), 1, generator=generator) - 0.5) * 6)
    return (torch.randn(rows, -(-k // 32), 32, generator=generator) * blocks).flatten(1)[:, :k].to(dtype)


def agrees(backend: Any) -> None:
    """Raise unless the backend gives the reference's results. Shapes are such that a mix-up of axes fits, too."""
    for scheme, fmt in (("w4a4", "mxfp4"), ("w4a4", "mxfp4_dualscale"), ("w4a8", "mxfp4"), ("w8a8", "mxfp8")):
        for m, n, k in ((2, 2, 1024), (16, 16, 1024), (5, 32, 64), (4, 7, 576 if scheme == "w4a8" else 1120)):
            for dtype in SCHEMES[scheme].output_dtypes(fmt):
                check_linear(backend, scheme, fmt, m, n, k, dtype)
    x = numbers(3, 96, torch.bfloat16, 1)
    for fmt, row in FORMATS.items():
        for rule, mode in itertools.product(row.rules, row.round_modes):
            check_quantizer(backend, x, fmt, rule, mode)


def check_quantizer(backend: Any, x: torch.Tensor, fmt: str, rule: str, mode: str) -> None:
    if FORMATS[fmt].outer:
        mul_scale = torch.linspace(0.5, 2, x.shape[1])
        packed = mxdit.encode(x, fmt, rule, mode, mul_scale)
        codes, outer, scale = backend.quantize_dual(x.to("npu"), mul_scale.to("npu"), mode)
        assert torch.equal(outer.cpu(), packed.outer), f"numbers: {fmt}: level-0 scales"
    else:
        packed = mxdit.encode(x, fmt, rule, mode)
        codes, scale = backend.quantize(x.to("npu"), fmt, rule, mode)
    assert torch.equal(codes.cpu(), packed.codes), f"numbers: {fmt} {rule} {mode}: codes"
    assert torch.equal(scale.cpu(), packed.scale), f"numbers: {fmt} {rule} {mode}: scales"


def check_linear(backend: Any, *case: Any) -> None:
    scheme, fmt, m, n, k, dtype = case
    arguments, expected = product(*case)
    args = [None if t is None else t.to("npu") for t in arguments]
    got = backend.linear(*args, scheme, rule_of(scheme, fmt), "packed").cpu()
    assert got.dtype is expected.dtype, f"dtype: {scheme} over {fmt}"
    if scheme == "w4a4":
        same = torch.equal(got, expected)
    else:
        same = torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-8 * float(expected.abs().mean()))
    assert same, f"numbers: {scheme} over {fmt}: {m}x{n}x{k} {dtype}"


@cache
def product(scheme: str, fmt: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[list[Any], torch.Tensor]:
    """Arguments of a linear op, and what the reference makes of them."""
    w = mxdit.encode(numbers(n, k, torch.bfloat16, 4) * 0.1, fmt)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(5)) / 3
    mul_scale = torch.linspace(0.5, 2, k) if w.format.smooths else None
    arguments = [numbers(m, k, dtype, 3), w.codes, w.scale, w.outer, mul_scale, bias]
    with native.using("reference"):
        return arguments, torch.ops.mxdit.linear(*arguments, scheme, rule_of(scheme, fmt), "packed")


def rule_of(scheme: str, fmt: str) -> str:
    return FORMATS[str(SCHEMES[scheme].weights[fmt])].default_rule


def test_the_backend_itself_agrees():
    agrees(mutant("# -- the operators ---", "# -- the operators ---"))


@pytest.mark.parametrize(("old", "new", "caught"), [row[1:] for row in MUTANTS], ids=[row[0] for row in MUTANTS])
def test_a_mistake_is_caught(old, new, caught):
    with pytest.raises((RuntimeError, AssertionError), match=caught):
        agrees(mutant(old, new))
