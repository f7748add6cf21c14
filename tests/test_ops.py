"""The ops as torch and its users see them: linear, fakes, compilation, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import mxdit
import oracle
from agreement import KINDS, dual, exact_values
from mxdit import ops

OPS = torch.ops.mxdit


# -- linear ------------------------------------------------------------------------------------------------------------

LINEARS = [
    (scheme, method)
    for scheme, method in itertools.product(mxdit.numerics.formats.SCHEMES, mxdit.numerics.formats.FORMATS)
    if method in mxdit.numerics.formats.SCHEMES[scheme].weights
]


def linear_args(scheme: str, method: str, x: torch.Tensor, n: int = 24, rule: str | None = None) -> tuple[object, ...]:
    """Arguments of mxdit::linear over random weights, with everything optional that the method has."""
    k = x.shape[-1]
    w, bias = torch.randn(n, k).bfloat16() * 0.1, torch.randn(n).to(x.dtype)
    packed = mxdit.encode(w, method)
    smooth = (torch.rand(k) + 0.5).bfloat16().float() if packed.format.smooths else None
    activation = mxdit.numerics.formats.SCHEMES[scheme].weights[method]
    rule = rule or ("ocp" if activation is None else mxdit.numerics.formats.FORMATS[activation].default_rule)
    return x, packed.codes, packed.scale, packed.outer, smooth, bias, scheme, rule, "packed"


on_every_path = pytest.mark.usefixtures("path")


@on_every_path
@pytest.mark.parametrize(("scheme", "method"), LINEARS)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_linear_is_quantize_and_matmul(scheme, method, dtype):
    """Against decoded operands in float64, to the rounding of the result; four-bit products also bit for bit."""
    if dtype not in mxdit.numerics.formats.SCHEMES[scheme].output_dtypes(method):
        with pytest.raises(mxdit.FormatError, match=r"torch.float32"):
            OPS.linear(*linear_args(scheme, method, torch.randn(3, 1056).to(dtype)))
        return
    x = torch.randn(2, 3, 1056).to(dtype)
    args = linear_args(scheme, method, x)
    _, w, w_scale, w_dual, smooth, bias, _, rule, _ = args
    got = OPS.linear(*args)
    assert got.shape == (2, 3, 24) and got.dtype is dtype

    smoothed = x if smooth is None else x * smooth.to(dtype)
    activation = mxdit.numerics.formats.SCHEMES[scheme].weights[method]
    left = smoothed.double() if activation is None else mxdit.decode(mxdit.encode(smoothed, activation, rule)).double()
    right = mxdit.decode(mxdit.Packed(w, w_scale, w_dual, method)).double()
    exact = left @ right.T + bias.double()
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    if scheme == "w4a4" and w_dual is None:
        codes, scale = OPS.quantize(smoothed, "mxfp4", rule, "rint")
        assert torch.equal(got, OPS.matmul(codes, scale, w, w_scale, bias, "mxfp4", "mxfp4", dtype))
    if scheme == "w4a4" and w_dual is not None:
        codes, l0, l1 = OPS.quantize_dual(x, smooth, "rint")
        assert torch.equal(got, OPS.matmul_dual(codes, w, l0, w_dual, l1, w_scale, bias, dtype))


@on_every_path
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
def test_float_and_eight_bit_activations_over_dual_weights_sum_by_groups(scheme):
    """acc = fma(p, weight's level 0, acc), bias first; with activations of two bits p is exact and the oracle can tell."""
    x = torch.randint(-3, 4, (3, 1100)).bfloat16()
    _, w, w_scale, w_dual, _, _, *rest = linear_args(scheme, "mxfp4_dualscale", x, 5)
    bias = torch.randn(5)
    got = OPS.linear(x, w, w_scale, w_dual, None, bias, scheme, rest[1], "packed")
    vw, outer = exact_values(w, w_scale, "mxfp4"), w_dual.tolist()
    chain = [
        [oracle.dot_groups(row, vw[n], [1.0] * 3, outer[n], bias[n].item()) for n in range(5)]
        for row in x.double().numpy()
    ]
    np.testing.assert_array_equal(got.double().numpy(), oracle.to_float(np.array(chain), oracle.BF16))


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    half_k=st.integers(1, 400),
    n=st.integers(1, 20),
    case=st.sampled_from(LINEARS),
    with_bias=st.booleans(),
)
def test_linear_of_any_shape(lead, half_k, n, case, with_bias):
    x = torch.randn(*lead, 2 * half_k).bfloat16()
    args = list(linear_args(*case, x, n))
    args[5] = args[5] if with_bias else None
    got = OPS.linear(*args)
    assert got.shape == (*lead, n) and got.dtype is torch.bfloat16 and got.is_contiguous()
    if x.numel():
        flat = OPS.linear(x.reshape(-1, x.shape[-1]), *args[1:])
        assert torch.equal(flat.view(got.shape), got)


@on_every_path
def test_the_programs_precision_settings_neither_change_results_nor_are_changed():
    x = torch.randn(64, 512)
    args = linear_args("w4a16", "mxfp4", x)
    expected = OPS.linear(*args)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(OPS.linear(*args), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OPS.linear(*args), expected)
        assert torch.is_autocast_enabled("cpu")


# -- how torch sees them -----------------------------------------------------------------------------------------------


def op_samples() -> list[tuple[str, tuple[object, ...]]]:
    torch.manual_seed(3)
    x, w = torch.randn(3, 5, 544).bfloat16(), torch.randn(8, 544).bfloat16()
    bias = torch.randn(8).bfloat16()
    p4, p8, w4 = mxdit.encode(x, "mxfp4"), mxdit.encode(x, "mxfp8"), mxdit.encode(w, "mxfp4")
    (x2, l0, l1), (w2, w0, w1) = dual(x), dual(w)
    attended = (torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 6), torch.rand(5, 7) > 0.3)
    samples: list[tuple[str, tuple[object, ...]]] = [
        ("quantize", (x, "mxfp4", "uos", "rint")),
        ("quantize", (x.float(), "mxfp8", "cublas", "rint")),
        ("quantize_dual", (x, None, "floor")),
        ("quantize_dual", (x.half(), torch.rand(544), "rint")),
        ("dequantize", (p4.codes, p4.scale, None, "mxfp4", torch.float16)),
        ("dequantize", (x2, l1, l0, "mxfp4_dualscale", torch.bfloat16)),
        ("matmul", (p4.codes, p4.scale, w4.codes, w4.scale, bias, "mxfp4", "mxfp4", torch.float32)),
        ("matmul", (p8.codes, p8.scale, w4.codes, w4.scale, None, "mxfp8", "mxfp4", torch.float16)),
        ("matmul_dual", (x2, w2, l0, w0, l1, w1, bias, torch.bfloat16)),
        ("attention", (*attended[:3], None, 0.2, True, "exact")),
        ("attention", (*attended, 0.2, False, "exact")),
        ("rms_norm", (x, torch.rand(544), 1e-6, *torch.randn(2, 5, 32).unbind(0), False)),
    ]
    return samples + [("linear", linear_args(scheme, method, x)) for scheme, method in LINEARS]


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("name", "args"), op_samples(), ids=lambda value: value if isinstance(value, str) else "")
class TestEveryOp:
    def test_opcheck(self, name, args):
        torch.library.opcheck(getattr(OPS, name).default, args)

    def test_compiled_equals_eager(self, name, args):
        op = getattr(OPS, name)
        torch.compiler.reset()
        compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")
        assert equal(compiled(*args), op(*args))

    def test_meta_and_fake_tensors(self, name, args):
        op = getattr(OPS, name)
        real = op(*args)
        real = real if isinstance(real, tuple | list) else (real,)
        on_meta = op(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in args))
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in args))
        for other in (on_meta, fake):
            other = other if isinstance(other, tuple | list) else (other,)
            assert [(t.shape, t.dtype) for t in other] == [(t.shape, t.dtype) for t in real]

    def test_inputs_are_left_alone(self, name, args):
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
        getattr(OPS, name)(*args)
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True) if isinstance(a, torch.Tensor))


def test_there_is_a_sample_of_every_op():
    """Of those in place, test_rowwise.py has them."""
    assert {name for name, _ in op_samples()} == {name for name in ops.OPS if not name.endswith("_")}


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(name: str, index: int, value: object, sample: int = 0, error: type[Exception] = mxdit.FormatError) -> str:
    """The message of a sample of that op with one argument exchanged; meta tensors are refused alike."""
    args = list([args for op, args in op_samples() if op == name][sample])
    args[index] = value
    with pytest.raises(error) as caught:
        getattr(OPS, name)(*args)
    on_meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in args]
    with pytest.raises(error):
        getattr(OPS, name)(*on_meta)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: refused("quantize", 1, "mxfp4_dualscale"), ["two scale levels", "quantize_dual"]),
        (lambda: refused("quantize", 1, "nvfp4"), ["unknown format", "'nvfp4'", "mxfp4"]),
        (lambda: refused("quantize", 2, "cublas"), ["no such scale rule", "'cublas'", "uos"]),
        (lambda: refused("quantize_dual", 0, torch.zeros(2, 64)), ["torch.float32", "torch.bfloat16"]),
        (lambda: refused("dequantize", 3, "mxfp8"), ["scales do not fit", "neither padded nor paired"]),
        (
            lambda: refused("matmul", 6, "mxfp8"),
            ["no scheme multiplies", "mxfp4 activations, mxfp8 weights", "mxfp8 x mxfp4"],
        ),
        (lambda: refused("matmul", 2, torch.zeros(8, 272)), ["weight", "torch.float32", "torch.uint8"]),
        (lambda: refused("matmul", 4, torch.zeros(9)), ["bias", "(9,)", "(8,)"]),
        (lambda: refused("matmul", 7, torch.float32, 1), ["output dtype", "torch.float32", "section"]),
        (lambda: refused("matmul_dual", 7, torch.float32), ["output dtype", "torch.bfloat16", "4.3"]),
        (lambda: refused("matmul_dual", 3, torch.zeros(8, 2).bfloat16()), ["weight", "torch.bfloat16", "loses them"]),
        (lambda: refused("linear", 6, "w2a2"), ["unknown scheme", "'w2a2'", "w4a16"]),
        (lambda: refused("linear", 6, "w8a8", 1), ["w8a8", "no dual-scale weights"]),
        (lambda: refused("linear", 7, "cublas"), ["no such scale rule", "'cublas'"]),
        (lambda: refused("linear", 8, "tiled", error=mxdit.BackendError), ["layout", "'tiled'", "'packed'"]),
        (lambda: refused("linear", 0, torch.zeros(2, 64).bfloat16()), ["(24, 272)", "(N, 32)", "K = 64"]),
        (lambda: refused("linear", 4, torch.ones(544), 6), ["mxfp8 takes no mul_scale"]),
        (lambda: refused("linear", 0, torch.zeros(2, 544, dtype=torch.int32), 4), ["torch.int32"]),
    ],
)
def test_errors_say_what_and_what_else(call, words):
    message = call()
    assert all(word in message for word in words), message
