"""The native CPU kernels on every instruction set path that this machine runs: the reference's bits, whatever the input."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mxdit
from agreement import every_pattern
from mxdit.backends import backends, native
from mxdit.numerics.formats import FORMATS, SCHEMES
from processes import python

OPS = torch.ops.mxdit
HALF = [torch.bfloat16, torch.float16]
ENCODINGS = [
    (fmt, rule, mode, dtype)
    for fmt, row in FORMATS.items()
    for rule, mode, dtype in itertools.product(row.rules, row.round_modes, row.inputs)
]
LINEARS = [(scheme, fmt) for scheme, row in SCHEMES.items() for fmt in row.weights]


def every_path() -> Iterator[str]:
    """Each path of this machine, while it answers. The reference is computed once, outside."""
    for path in native.paths():
        with native.using(path):
            yield path


def packed_by_op(
    x: torch.Tensor, fmt: str, rule: str, mode: str, mul_scale: torch.Tensor | None = None
) -> mxdit.Packed:
    if FORMATS[fmt].outer:
        codes, outer, scale = OPS.quantize_dual(x, mul_scale, mode)
        return mxdit.Packed(codes, scale, outer, fmt)
    codes, scale = OPS.quantize(x, fmt, rule, mode)
    return mxdit.Packed(codes, scale, None, fmt)


def assert_same(got: mxdit.Packed, expected: mxdit.Packed) -> None:
    assert torch.equal(got.scale, expected.scale) and torch.equal(got.codes, expected.codes)
    assert (got.outer is None) == (expected.outer is None)
    if got.outer is not None and expected.outer is not None:
        assert torch.equal(got.outer.view(torch.int32), expected.outer.view(torch.int32))


def assert_same_values(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, NaN where NaN; the sign of a zero counts, too."""
    assert got.dtype is expected.dtype and got.shape == expected.shape
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(got[~nan], expected[~nan]) and torch.equal(got[~nan].signbit(), expected[~nan].signbit())


def spread(rows: int, k: int, binades: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers whose blocks differ by some binades."""
    blocks = torch.exp2((torch.rand(rows, math.ceil(k / 32), 1) - 0.5) * binades)
    return (torch.randn(rows, math.ceil(k / 32), 32) * blocks).reshape(rows, -1)[:, :k].to(dtype)


def weights(fmt: str, n: int, k: int, binades: float = 4) -> mxdit.Packed:
    return mxdit.encode(spread(n, k, binades) * 0.1, fmt)


def linear(
    x: torch.Tensor, w: mxdit.Packed, scheme: str, bias: torch.Tensor | None = None, smooth: bool = True
) -> torch.Tensor:
    mul_scale = (torch.arange(x.shape[-1]) % 7 * 0.25 + 0.5) if smooth and w.format.smooths else None
    activation = SCHEMES[scheme].weights[w.fmt]
    rule = "ocp" if activation is None else FORMATS[activation].default_rule
    return OPS.linear(x, w.codes, w.scale, w.outer, mul_scale, bias, scheme, rule, "packed")


def assert_close(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, w: mxdit.Packed) -> None:
    """Within what fp32 sums of another order may differ by, and the rounding of the result."""
    magnitude = x.double().abs().nan_to_num(0, 0, 0) @ mxdit.decode(w).double().abs().T * 8
    bound = magnitude * 2.0**-20 + expected.double().abs() * torch.finfo(got.dtype).eps
    error = (got.double() - expected.double()).abs()
    assert bool((error <= bound + 1e-30).all()), float((error - bound).max())


# -- encode and decode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule", "mode", "dtype"), ENCODINGS, ids=str)
def test_every_pattern_encodes_as_the_codec_says(fmt, rule, mode, dtype):
    if dtype is torch.float32:
        bits = torch.randint(-(2**31), 2**31, (256, 1024), dtype=torch.int64).to(torch.int32)
        cases = [bits.view(dtype), spread(64, 2048, 40, dtype), torch.randn(9, 66) * 1e-38]
    else:
        every = every_pattern(dtype)
        beside = torch.zeros(65536, 32, dtype=dtype)  # beside zeros, and beside one number of any size
        beside[:, 3] = every
        beside[::2, 20] = (torch.randn(32768) * torch.exp2(torch.randint(-60, 60, (32768,)))).to(dtype)
        mixed = every[torch.randperm(65536)].view(64, 1024)
        cases = [every.view(-1, 64), mixed, beside.view(-1, 1024), spread(33, 1056, 30, dtype)]
    for x in cases:
        expected = mxdit.encode(x, fmt, rule, mode)
        for _ in every_path():
            assert_same(packed_by_op(x, fmt, rule, mode), expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", ["rint", "round", "floor"])
def test_dual_level_with_multipliers(dtype, mode):
    x = every_pattern(dtype)[torch.randperm(65536)].view(-1, 2048)
    mul_scale = torch.exp2(torch.randn(2048) * 3).to(torch.bfloat16).float()
    tiny = (torch.randn(7, 1100) * 2.0**-124).to(dtype)  # level 0 flushes in some groups
    for values, multipliers in ((x, mul_scale), (x, None), (tiny, None)):
        expected = mxdit.encode(values, "mxfp4_dualscale", "ocp", mode, multipliers)
        for _ in every_path():
            assert_same(packed_by_op(values, "mxfp4_dualscale", "ocp", mode, multipliers), expected)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_code_under_every_scale_decodes_as_the_codec_says(fmt, dtype):
    row = FORMATS[fmt]
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).view(-1, 1).repeat(1, row.blocks(256 * row.per_byte))
    outer = torch.exp2(torch.randn(256, row.groups(256 * row.per_byte)) * 20) if row.outer else None
    expected = mxdit.decode(mxdit.Packed(codes, scale, outer, fmt), dtype)
    for _ in every_path():
        assert_same_values(OPS.dequantize(codes, scale, outer, fmt, dtype), expected)


@settings(max_examples=25)
@given(rows=st.integers(1, 5), half_k=st.integers(1, 700), gap=st.integers(0, 3), case=st.sampled_from(ENCODINGS))
def test_rows_of_any_length_and_stride(rows, half_k, gap, case):
    fmt, rule, mode, dtype = case
    x = spread(rows, 2 * half_k + gap, 12, dtype)[:, : 2 * half_k]
    packed = mxdit.encode(x, fmt, rule, mode)
    values = mxdit.decode(packed)
    for _ in every_path():
        assert_same(packed_by_op(x, fmt, rule, mode), packed)
        assert_same_values(OPS.dequantize(packed.codes, packed.scale, packed.outer, fmt, torch.float32), values)


# -- products ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    half_k=st.integers(1, 700),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    fmt=st.sampled_from(["mxfp4", "mxfp4_dualscale"]),
    binades=st.sampled_from([0.0, 4.0, 8.0]),
    with_bias=st.booleans(),
)
def test_four_bit_products_are_the_references(m, n, half_k, dtype, fmt, binades, with_bias):
    if dtype not in SCHEMES["w4a4"].output_dtypes(fmt):
        dtype = torch.bfloat16
    x, w = spread(m, 2 * half_k, binades, dtype), weights(fmt, n, 2 * half_k, binades / 2)
    bias = torch.randn(n).to(dtype) if with_bias else None
    with native.using("reference"):
        expected = linear(x, w, "w4a4", bias)
    for _ in every_path():
        assert torch.equal(linear(x, w, "w4a4", bias), expected)


@settings(max_examples=25)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 70),
    half_k=st.integers(1, 600),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    case=st.sampled_from([case for case in LINEARS if case[0] != "w4a4"]),
    with_bias=st.booleans(),
)
def test_other_products_are_the_references_within_fp32_sums(m, n, half_k, dtype, case, with_bias):
    scheme, fmt = case
    if dtype not in SCHEMES[scheme].output_dtypes(fmt):
        dtype = torch.bfloat16
    x, w = spread(m, 2 * half_k, 4, dtype), weights(fmt, n, 2 * half_k)
    bias = torch.randn(n).to(dtype) if with_bias else None
    with native.using("reference"):
        expected = linear(x, w, scheme, bias)
    for _ in every_path():
        assert_close(linear(x, w, scheme, bias), expected, x, w)


def test_odd_numbers_of_eight_bit_inputs():
    x, w = torch.randn(5, 1057).bfloat16(), torch.randn(9, 1057).bfloat16()
    a, b = mxdit.encode(x, "mxfp8"), mxdit.encode(w, "mxfp8")
    args = (a.codes, a.scale, b.codes, b.scale, None, "mxfp8", "mxfp8", torch.float32)
    with native.using("reference"):
        expected = OPS.matmul(*args)
    for _ in every_path():
        assert_close(OPS.matmul(*args), expected, x, b)


@pytest.mark.parametrize(
    ("scheme", "fmt", "dtype"),
    [(scheme, fmt, dtype) for scheme, fmt in LINEARS for dtype in SCHEMES[scheme].output_dtypes(fmt)],
    ids=str,
)
def test_special_blocks(scheme, fmt, dtype):
    """Inf and NaN beside ordinary numbers, zeros, subnormals, numbers whose products leave the range."""
    k = 1184
    x = spread(12, k, 4, dtype)
    x[0, 5], x[1, 700], x[2, 40] = torch.inf, -torch.inf, torch.nan
    x[3], x[4, 32:64], x[4, 512:1024] = 0, 0, 0
    x[5] *= torch.finfo(dtype).tiny
    x[6] *= torch.finfo(dtype).tiny * 2.0**-4
    x[7] = spread(1, k, 9, dtype)[0] * 2.0**-6
    x[8] = torch.finfo(dtype).max
    x[9] = -0.0
    w = weights(fmt, 40, k)
    # A weight of zeros, a block of zeros, and scales near either end of their range, which a wide sum cannot hold.
    w.codes[0], w.scale[0] = 0, 0
    blocks = slice(32, 48) if FORMATS[fmt].per_byte == 2 else slice(64, 96)
    w.codes[1, blocks], w.scale[1, 2] = 0, 0
    compare_special(x, w, scheme, nan_rows=0 if SCHEMES[scheme].weights[fmt] is None else 3)
    for byte in (0, 1, 3, 20, 100, 244, 245, 252, 253, 254, 255):
        w.scale[2:4] = byte
        compare_special(x[3:5], w, scheme)


def compare_special(x: torch.Tensor, w: mxdit.Packed, scheme: str, nan_rows: int = 0) -> None:
    """Where partial sums leave the range, their order decides between inf, which may saturate, and NaN.

    The first `nan_rows` rows have a NaN in every sum."""
    with native.using("reference"):
        expected = linear(x, w, scheme)
    largest = torch.finfo(expected.dtype).max
    finite = expected.abs() < largest
    scale = float(expected[finite].abs().median())
    for path in every_path():
        got = linear(x, w, scheme)
        assert not bool((got[~finite].abs() < largest).any()), path
        if nan_rows:
            assert bool(torch.isnan(got[:nan_rows]).all()), path
        if scheme == "w4a4":
            assert torch.equal(got[finite], expected[finite]), path
        else:
            torch.testing.assert_close(got[finite], expected[finite], rtol=2**-7, atol=2**-6 * scale)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_dualscale"])
def test_four_bit_results_depend_on_no_order(fmt):
    """Neither on the path, the number of threads, nor, within a group of 512, on a permutation of K's blocks."""
    x, w = spread(70, 2048, 6), weights(fmt, 96, 2048)
    results = []
    for _ in every_path():
        for count in (1, 2, 3, 5):
            with threads(count):
                results.append(linear(x, w, "w4a4", smooth=False))
        order = torch.cat([g * 16 + torch.randperm(16) for g in range(4)])
        codes = w.codes.view(96, 64, 16)[:, order].reshape(96, 1024)
        shuffled = mxdit.Packed(codes, w.scale[:, order].contiguous(), w.outer, fmt)
        results.append(linear(x.view(70, 64, 32)[:, order].reshape(70, 2048), shuffled, "w4a4", smooth=False))
    assert len(results) == 5 * len(native.paths())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("m", range(1, 6), ids="M={}".format)
@pytest.mark.parametrize("binades", [(8, 6), (8, 7), (9, 6)], ids=str)
def test_scales_of_one_group_far_apart(m, binades):
    """Up to what a path shifts within a window, and one binade further. All numbers of a block are alike, powers of two, so
    that each sum is exact in any order."""

    def blocks(rows: int, apart: int) -> torch.Tensor:
        exponent = torch.randint(0, apart + 1, (rows, 18))
        exponent[:, 2], exponent[:, 7] = 0, apart
        return torch.exp2(exponent.float()) * (torch.randint(0, 2, (rows, 18)) * 2 - 1) * 4

    x, w = blocks(m, binades[0]), blocks(33, binades[1])
    x[0, 3] = w[20, 4] = 0
    exact = (x.double() @ w.double().T * 32).float()
    packed = mxdit.encode(w.repeat_interleave(32, 1), "mxfp4")
    for path in every_path():
        got = linear(x.repeat_interleave(32, 1), packed, "w4a4", smooth=False)
        assert torch.equal(got, exact), path


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "fmt"), LINEARS, ids=str)
@pytest.mark.parametrize("m", [63, 64, 200], ids="M={}".format)
@pytest.mark.parametrize("extreme", [False, True], ids=["plain", "extreme"])
def test_rows_of_a_threads_own(scheme, fmt, m, extreme):
    """Two threads take 32 rows or more apart, also where one of them meets what the quick kernels decline."""
    x, w = spread(m, 2 * 600, 4)[:, 3:1059], weights(fmt, 70, 1056)
    if extreme:
        x[m - 1] *= 2.0**112 if scheme == "w4a4" else 2.0**-100
    bias = torch.randn(70)
    for _ in every_path():
        with threads(1):
            alone = linear(x, w, scheme, bias)
        with threads(2):
            assert_same_values(linear(x, w, scheme, bias), alone)
        if scheme == "w4a4":
            with native.using("reference"):
                assert_same_values(linear(x, w, scheme, bias), alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_dualscale"])
def test_a_bias_of_any_dtype(fmt, dtype):
    x, w, bias = torch.randn(3, 64).bfloat16(), weights(fmt, 40, 64), torch.randn(80)[::2].to(dtype)
    with native.using("reference"):
        expected = linear(x, w, "w4a4", bias)
    for _ in every_path():
        assert torch.equal(linear(x, w, "w4a4", bias), expected)
        assert torch.equal(linear(x, w, "w4a4", None), linear(x, w, "w4a4", torch.zeros(40, dtype=dtype)))


def test_views_are_read_as_they_are():
    w = weights("mxfp4", 33, 128)
    base = torch.randn(5, 128, 6).bfloat16()
    wide = torch.randn(7, 300).bfloat16()[:, 30:158]
    strided = mxdit.Packed(w.codes.T.contiguous().T, w.scale.T.contiguous().T, None, "mxfp4")
    for _ in every_path():
        for view in (base.transpose(1, 2), wide, wide[::2], wide.flip(0), base[:, :, 0], base[0, :, 0].expand(4, 128)):
            assert torch.equal(linear(view, w, "w4a4"), linear(view.contiguous(), w, "w4a4"))
            assert torch.equal(OPS.quantize(view, "mxfp4", "uos", "rint")[0], mxdit.encode(view, "mxfp4").codes)
        assert torch.equal(linear(wide, strided, "w4a4"), linear(wide, w, "w4a4"))


# -- the program around --------------------------------------------------------------------------------------------------


def test_flushing_subnormals_elsewhere_changes_nothing_here():
    x = torch.randn(40, 96).half() * 2.0**-20
    w = mxdit.encode((torch.randn(8, 96) * 2.0**-126).bfloat16(), "mxfp4", "uos")
    expected, values = mxdit.encode(x, "mxfp4"), mxdit.decode(w)
    assert bool((values.abs() < 2.0**-126).any())
    for _ in every_path():
        torch.set_flush_denormal(True)
        try:
            got = packed_by_op(x, "mxfp4", "uos", "rint")
            decoded = OPS.dequantize(w.codes, w.scale, None, "mxfp4", torch.float32)
            still_set = float(torch.tensor([1e-40]) * 1.0) == 0.0
        finally:
            torch.set_flush_denormal(False)
        assert_same(got, expected)
        assert torch.equal(decoded, values) and still_set


def test_calls_from_several_threads_at_once():
    x, w = spread(64, 1024, 6), weights("mxfp4", 256, 1024)
    expected, wrong = linear(x, w, "w4a4"), []

    def work() -> None:
        for _ in range(20):
            if not torch.equal(linear(x, w, "w4a4"), expected):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("before", ["y()", "torch.randn(1500, 1500) @ torch.randn(1500, 1500)"])
def test_a_forked_child_computes_the_same(before):
    """Whether the parent's threads were ours to start or torch's."""
    code = f"""
import os, torch, mxdit
torch.set_num_threads(2)
x, w = torch.randn(300, 1024).bfloat16(), mxdit.encode(torch.randn(512, 1024).bfloat16(), "mxfp4")
def y():  # as bytes: torch's own operations hang in a child of a process that used its threads
    return torch.ops.mxdit.linear(x, w.codes, w.scale, None, None, None, "w4a4", "uos", "packed").view(torch.int16).numpy().tobytes()
{before}
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, len(y()).to_bytes(8, "little") + y()[:60000])
    os._exit(0)
answer, status = os.read(read, 60008), os.waitpid(child, 0)[1]
print("status", status, answer[8:] == y()[:60000])
"""
    done = python("-c", code)
    assert done.stdout.split() == ["status", "0", "True"], done.stderr


@pytest.mark.slow
def test_the_environment_forces_a_path(monkeypatch):
    try:
        for path in native.paths():
            monkeypatch.setenv("MXDIT_CPU_PATH", path)
            native.choose()
            assert (native.selected(), native.why_not()) == (path, None)
        monkeypatch.setenv("MXDIT_CPU_PATH", "reference")
        native.choose()
        assert native.selected() == "reference"
        assert str(native.why_not()).startswith("the reference was chosen (MXDIT_CPU_PATH")
        monkeypatch.setenv("MXDIT_CPU_PATH", "")
        native.choose()
        assert (native.selected(), native.why_not()) == (native.paths()[0], None)
    finally:
        native.select(None)
    # And a program asks for it when it starts.
    code = "import mxdit; from mxdit.backends import native; print(native.selected(), native.why_not())"
    assert python("-c", code, MXDIT_CPU_PATH="scalar").stdout.split() == ["scalar", "None"]
    refused = python(
        "-c",
        f"{code}; import torch; torch.ops.mxdit.quantize(torch.ones(1, 32), 'mxfp4', 'ocp', 'rint')",
        MXDIT_CPU_PATH="sse9",
    )
    assert refused.returncode
    for text in (refused.stdout, refused.stderr):
        assert all(word in text for word in ("MXDIT_CPU_PATH", "'sse9'", "scalar", "reference"))
    said = python("-c", "from mxdit.cli import main; main()", MXDIT_CPU_PATH="sse9")
    assert "Traceback" not in said.stderr


def test_select_refuses_and_puts_back():
    before = native.selected()
    with pytest.raises(mxdit.BackendError, match=r"'nope'.*scalar"):
        native.select("nope")
    with native.using("scalar"):
        assert native.selected() == "scalar"
        with native.using("reference"):
            assert native.selected() == "reference" and "reference" in str(native.why_not())
        assert native.selected() == "scalar"
    assert native.selected() == before


def test_the_library_is_there_where_it_can_be_built():
    """An installation falls back to none when the build fails, and says so only in pip's log."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        assert native.paths()[-1:] == ("scalar",), "the native library did not build: see pip install -v -e ."


def test_without_a_library_the_reference_answers_and_info_says_why(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert native.paths() == () and native.selected() == "reference"
    record = next(b for b in backends() if b.device == "cpu")
    assert "compiler" in str(record.why_not())
    with pytest.raises(mxdit.BackendError, match="compiler"):
        native.select("scalar")
    monkeypatch.setenv("MXDIT_CPU_PATH", "avx2")
    native.choose()
    try:
        with native.using("reference"):
            OPS.quantize(torch.ones(1, 32), "mxfp4", "ocp", "rint")
        assert "'avx2'" in str(native.why_not())
        with pytest.raises(mxdit.BackendError, match=r"MXDIT_CPU_PATH.*'avx2'.*compiler"):
            OPS.quantize(torch.ones(1, 32), "mxfp4", "ocp", "rint")
    finally:
        native.select(None)


def test_what_is_refused_is_refused_before_and_after_it_was_seen():
    w = weights("mxfp4", 8, 64)
    for _ in range(2):
        assert linear(torch.randn(2, 64).bfloat16(), w, "w4a4").shape == (2, 8)
        for x in (torch.tensor(1.0).bfloat16(), torch.randn(2, 62).bfloat16(), torch.randn(2, 64).double()):
            with pytest.raises(mxdit.FormatError):
                OPS.linear(x, w.codes, w.scale, None, None, None, "w4a4", "uos", "packed")
