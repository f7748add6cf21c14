"""The Triton kernels: in Triton's interpreter they give the reference's bits, by every route; and they compile for GPUs."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxdit.backends import backends, cuda
from mxdit.conformance import Case, cases
from mxdit.conformance.block import BlockCase
from mxdit.conformance.calls import ByReference
from mxdit.errors import BackendError
from mxdit.numerics.codec import Packed, decode, encode
from mxdit.numerics.formats import FORMATS, SCHEMES

pytest.importorskip("triton", minversion="3.9")  # whose interpreter has FMA and dot_scaled

from interpreted import interpreted  # after triton is known to be there
from mxdit.backends import triton_codec, triton_matmul

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROUTES = ("int8", "bf16", "fp4")
# All but what differs from another case in the rounding mode alone, and takes the interpreter long.
SLOW = [f"mxfp4_dualscale {mode}" for mode in ("round", "floor", "rint: every fp16", "rint with mul_scale: every bf16")]
SLOW += [f"mxfp4 {rule} {mode}" for rule in ("even6", "even7") for mode in ("round", "floor")] + ["K = 13824"]
SLOW += [f"linear {scheme} {fmt}: Wan's K" for scheme in SCHEMES for fmt in FORMATS]  # K = 96 has the same kernels
SLOW += ["attention", "rms_norm", "gelu_"]  # smaller ones are interpreted where these ops have their tests


def shorter(case: Case | BlockCase) -> Case | BlockCase:
    """Products without K = 13824, which test_shard_products has: it differs from 5120 in length alone."""
    if not isinstance(case, Case) or not case.name.startswith("matmul"):
        return case
    *given, ks = case.calls.args
    return replace(case, calls=partial(case.calls.func, *given, tuple(k for k in ks if k != 13824)))


CASES = [shorter(case) for case in cases() if not any(name in case.name for name in SLOW)]


@pytest.fixture(autouse=True)
def gpu():
    """`torch.ops.mxdit` by the CUDA backend, on CPU tensors."""
    with interpreted():
        yield


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, where a device says nothing
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case, monkeypatch):
    if "Wan's K" in case.name:
        monkeypatch.setitem(triton_matmul.FLOATS, "step", 512)  # the same sums in fewer steps
    if "every" in case.name:
        monkeypatch.setattr(triton_codec, "ROWS", 256)  # the same rows in fewer programs
    result = case.run("cpu")
    assert result.verdict == "pass", result.reason


# -- products ------------------------------------------------------------------------------------------------------------


def packed(rows: int, k: int, fmt: str, spread: float = 0.0) -> Packed:
    """Gaussian rows, whose blocks lie up to about 3 ``spread`` binades apart."""
    blocks = torch.exp2(spread * torch.randn(rows, -(-k // 32))).repeat_interleave(32, 1)[:, :k]
    return encode((torch.randn(rows, k) * blocks).bfloat16(), fmt)


def multiply(a: Packed, w: Packed, bias: torch.Tensor | None, out: torch.dtype) -> torch.Tensor:
    if a.outer is not None:
        return torch.ops.mxdit.matmul_dual(a.codes, w.codes, a.outer, w.outer, a.scale, w.scale, bias, out)
    return torch.ops.mxdit.matmul(a.codes, a.scale, w.codes, w.scale, bias, a.fmt, w.fmt, out)


def expected(*args: Any) -> torch.Tensor:
    with ByReference():
        return multiply(*args)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_dualscale"])
def test_every_route_gives_the_same_bits(monkeypatch, route, fmt):
    """Also where some rows of a tile, some tiles, or none can be folded."""
    monkeypatch.setenv(cuda.VARIABLE, route)
    for m, n, k, spread in ((1, 1, 32, 0), (5, 7, 96, 2), (140, 33, 576, 0.3), (200, 130, 1056, 0)):
        a, w = packed(m, k, fmt, spread), packed(n, k, fmt)
        if m == 200:  # of two tiles of rows one has a row that does not fit
            a.scale[150, 3] += 9
        for bias in (None, torch.randn(n)):
            args = (a, w, bias, torch.bfloat16)
            assert torch.equal(multiply(*args), expected(*args)), (m, n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float_activations_meet_every_eight_bit_weight(dtype):
    """Each finite code under each byte, one by one: x is the identity. bf16 holds them from byte 3 on."""
    byte = torch.arange(3 if dtype is torch.bfloat16 else 0, 247).to(torch.uint8)  # above, the largest exceed fp32
    codes = torch.arange(256).to(torch.uint8).repeat(len(byte), 1)
    codes[:, [0x7F, 0xFF]] = 0
    w = Packed(codes, byte[:, None].repeat(1, 8), None, "mxfp8")
    got = torch.ops.mxdit.linear(torch.eye(256).to(dtype), codes, w.scale, None, None, None, "w8a16", "ocp", "packed")
    limit = torch.finfo(dtype).max
    assert torch.equal(got, decode(w).T.clamp(-limit, limit).to(dtype))
    codes, scale = codes[:12].clone(), w.scale[:12].clone()
    codes[7, 40], scale[9, 2] = 0x7F, 0xFF
    got = torch.ops.mxdit.linear(torch.ones(3, 256).to(dtype), codes, scale, None, None, None, "w8a16", "ocp", "packed")
    assert all(row.nonzero().flatten().tolist() == [7, 9] for row in got.isnan())


def test_fallback_tiles_may_be_smaller(monkeypatch):
    """A tile that `_integers` leaves is taken in parts, and nothing else is."""
    monkeypatch.setitem(triton_matmul.FLOATS, "tile_m", 32)
    monkeypatch.setitem(triton_matmul.FLOATS, "tile_n", 64)
    a, w = packed(300, 576, "mxfp4", 0), packed(140, 576, "mxfp4")
    a.scale[140, 2] += 7  # the second of three tiles of rows
    assert torch.equal(multiply(a, w, None, torch.bfloat16), expected(a, w, None, torch.bfloat16))


def test_what_folds_is_left_to_the_integers(monkeypatch):
    """The fallback must not compute, and so write, what it should leave: here it has other weights."""
    a, w = packed(200, 576, "mxfp4", 0), packed(40, 576, "mxfp4")
    a.scale[150, 2] += 7
    true = expected(a, w, None, torch.bfloat16)
    fold = triton_matmul.fold

    def folding(codes: torch.Tensor, scale: torch.Tensor, k: int) -> Any:
        found = fold(codes, scale, k)
        if len(codes) == 40:
            w.codes.zero_()  # after the weight was folded
        return found

    monkeypatch.setattr(triton_matmul, "fold", folding)
    got = multiply(a, w, None, torch.bfloat16)
    assert torch.equal(got[:128], true[:128]) and not got[128:].any() and true[128:].any()


@settings(max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 2),
    st.sampled_from(["mxfp4", "mxfp4_dualscale"]),
)
def test_any_shape_and_spread(m, n, half, spread, fmt):
    args = (packed(m, 2 * half, fmt, spread), packed(n, 2 * half, fmt), torch.randn(n), torch.float16)
    assert torch.equal(multiply(*args), expected(*args))


def test_what_folds_is_decoded_exactly_and_what_does_not_says_so():
    codes = torch.randint(0, 256, (64, 512), dtype=torch.uint8)
    scale = torch.full((64, 32), 120, dtype=torch.uint8)
    shifts = torch.tensor([0, 3, 1, 2] * 8, dtype=torch.uint8)
    scale[0:8] += shifts
    scale[8, 5] += 4  # four binades: too far in the first group, and well in the second
    scale[9, 20] = 0xFF
    scale[10] = triton_codec.LOWEST - 1
    scale[11] = triton_codec.LOWEST
    scale[12] = triton_codec.HIGHEST
    scale[13] = triton_codec.HIGHEST + 1
    codes[14] = 0x08  # zeros, of both signs, under any scale
    scale[14, 0] = 3
    codes[15, 16 * 7 : 16 * 8] = 0x80
    scale[15, 7] = 250  # a block of zeros does not count
    folded, base = triton_codec.fold(codes, scale, 1024)
    fits = base > 0
    wrong = [(8, 0), (9, 1), (10, 0), (10, 1), (13, 0), (13, 1)]
    assert fits.logical_not().nonzero().tolist() == [list(place) for place in wrong]
    values = folded.double() * torch.exp2(base.double() - 128).repeat_interleave(512, 1)
    true = decode(Packed(codes, scale, None, "mxfp4"), torch.float64)
    kept = fits.repeat_interleave(512, 1)
    assert torch.equal(values[kept], true[kept]) and int(folded.abs().max()) == 96
    assert base[14].tolist() == [127, 127]  # nothing but zeros: any base does


def test_sums_of_the_largest_integers_are_exact():
    """12 << 3 in nearly every place, all of K in one direction."""
    k = 1024
    codes, scale = torch.full((2, k // 2), 0x77, dtype=torch.uint8), torch.full((2, k // 32), 100, dtype=torch.uint8)
    scale[:, ::2] += 3
    codes[:, :16] = 0x11
    a = Packed(codes, scale, None, "mxfp4")
    assert torch.equal(multiply(a, a, None, torch.float32), expected(a, a, None, torch.float32))
    assert bool((triton_codec.fold(codes, scale, k)[1] > 0).all())


def test_nan_stays_and_what_is_too_large_saturates():
    a, w = packed(3, 64, "mxfp4"), packed(4, 64, "mxfp4")
    for codes in (a.codes, w.codes):
        codes &= 0x77  # of one sign: infinities of both would make NaN, by the order of the sum
    a.scale[1, 0] = 0xFF
    a.scale[2] = 240
    w.scale[:] = 240
    for out in (torch.bfloat16, torch.float16):
        got, true = (function(a, w, None, out) for function in (multiply, expected))
        assert torch.equal(got.isnan(), true.isnan()) and got[1].isnan().all() and not got[2].isnan().any()
        assert torch.equal(got.nan_to_num(), true.nan_to_num())
        assert (got[2].abs() == torch.finfo(out).max).all()


def test_a_block_of_nan_is_not_taken_for_one_of_zeros():
    a, w = packed(3, 64, "mxfp4"), packed(4, 64, "mxfp4")
    a.scale[1, 0], a.codes[1, :16] = 0xFF, 0  # as it is encoded
    got = multiply(a, w, None, torch.bfloat16)
    assert got[1].isnan().all() and not got[::2].isnan().any()


def test_rows_are_folded_a_part_at_a_time(monkeypatch):
    a, w, bias = packed(300, 96, "mxfp4", 1), packed(9, 96, "mxfp4"), torch.randn(9)
    whole = multiply(a, w, bias, torch.bfloat16)
    monkeypatch.setattr(triton_matmul, "FOLDED", 32 * 96)
    assert torch.equal(multiply(a, w, bias, torch.bfloat16), whole)


def test_axes_strides_and_nothing():
    x = torch.randn(2, 3, 5, 96).bfloat16().transpose(0, 2)
    for op in (
        lambda x: torch.ops.mxdit.quantize(x, "mxfp4", "uos", "rint"),
        lambda x: torch.ops.mxdit.quantize_dual(x, None, "rint"),
    ):
        with ByReference():
            true = op(x)
        assert all(torch.equal(*pair) and pair[0].shape == pair[1].shape for pair in zip(op(x), true, strict=True))
        assert all(part.numel() == 0 for part in op(x[:0]))
    w = packed(7, 96, "mxfp4")
    args = (w.codes, w.scale, None, None, None, "w4a4", "uos", "packed")
    with ByReference():
        true = torch.ops.mxdit.linear(x, *args)
    assert torch.equal(torch.ops.mxdit.linear(x, *args), true) and true.shape == (5, 3, 2, 7)
    assert torch.ops.mxdit.linear(x[:0], *args).shape == (0, 3, 2, 7)


@pytest.fixture
def gpu_linear(monkeypatch):
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    return importlib.import_module("gpu_linear")


def test_the_benchmark_measures_every_route_and_checks_it(gpu_linear, monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(gpu_linear, "TILINGS", gpu_linear.TILINGS[:2] + gpu_linear.TILINGS[4:7])
    for kind in (gpu_linear.GAUSSIAN, gpu_linear.OUTLIERS):
        rows = {row.call: row for row in gpu_linear.measure(140, 576, 96, kind, 1e9, device, 1)}
        whole = [
            "mxfp4, int8",
            "mxfp4, bf16",
            "mxfp4_dualscale, int8",
            "mxfp4_dualscale, bf16",
            "mxfp8",
            "w4a8",
            "w4a16",
            "w8a16",
        ]
        assert all(rows[name].right for name in whole) and rows["fold w"].right is None
        assert rows["mxfp4, int8"].ratio < 1e9 and not rows["mxfp4, int8"].ok and rows["mxfp4, bf16"].ok
        gpu_linear.show(list(rows.values()))
    tiled = gpu_linear.tilings(70, 64, 96, device, 1)
    assert len(tiled) == len(gpu_linear.TILINGS) and all(row.right for row in tiled)
    assert (triton_matmul.INTEGERS["tile_m"], triton_matmul.INTEGERS["num_warps"]) == (128, 8)  # put back


def test_the_share_that_folds_is_of_pairs_of_tiles(gpu_linear):
    a = torch.ones(300, 2, dtype=torch.uint8)
    a[130, 1] = 0  # the second of three tiles of 128 rows
    w = torch.ones(100, 2, dtype=torch.uint8)
    assert gpu_linear.share_that_folds(a, w, 128, 128) == pytest.approx(2 / 3)
    w[0, 0] = 0
    assert gpu_linear.share_that_folds(a, w, 128, 128) == 0


# -- who answers ---------------------------------------------------------------------------------------------------------


def test_it_is_known_and_says_why_it_does_not_answer(monkeypatch):
    assert cuda.BACKEND in backends()
    if not torch.cuda.is_available():
        assert "CUDA" in (cuda.why_not() or "")  # torch is built without it, or sees no device
    monkeypatch.setenv(cuda.VARIABLE, "reference")
    assert cuda.why_not() == f"the reference was chosen ({cuda.VARIABLE})"
    monkeypatch.setenv(cuda.VARIABLE, "fp8")
    assert "int8 or bf16 or fp4 or reference" in (cuda.why_not() or "")
    with pytest.raises(BackendError, match="no such route"):
        torch.ops.mxdit.quantize(torch.randn(1, 32), "mxfp4", "uos", "rint")


def test_the_reference_answers_on_what_is_too_old_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(cuda, "_unfit", lambda index: "GTX 1080 is sm_61")
    cuda._warn.cache_clear()
    x = torch.randn(3, 64)
    with caplog.at_level(logging.WARNING):
        torch.ops.mxdit.quantize(x, "mxfp8", "ocp", "rint")
        got = torch.ops.mxdit.quantize(x, "mxfp8", "ocp", "rint")
    packed = encode(x, "mxfp8")
    assert torch.equal(got[0], packed.codes) and torch.equal(got[1], packed.scale)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "sm_61" in caplog.records[0].message


ORIGINAL = cuda._unfit, cuda.route  # before the fixture puts others in their place


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [((7, 5), None, "sm_75"), ((9, 0), "6.4", "ROCm"), ((9, 0), None, "triton does not start")],
)
def test_gpus_that_do_not_fit(monkeypatch, capability, hip, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert said in ORIGINAL[0].__wrapped__(0)  # there is no driver here for Triton to start


def test_each_gpu_has_its_route(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (9, 0), (10, 0), (12, 0)][index])
    route = ORIGINAL[1]
    assert [route(index) for index in range(4)] == ["int8", "int8", "bf16", "bf16"]
    monkeypatch.setenv(cuda.VARIABLE, "fp4")
    assert route(2) == "fp4"
    with pytest.raises(BackendError, match="FP4 tensor cores"):
        route(1)


# -- compiling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_for_gpus(arch, tmp_path):
    """What a compiler must not do is not in the code: flush, approximate, fuse; attention's exponentials may. The units that are
    meant are."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(arch)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    kernels = json.loads(found.stdout)
    assert len(kernels) == {80: 43, 90: 21, 100: 41}[arch]
    for name, kernel in kernels.items():
        exact = name.startswith("exact attention")  # whose exponentials are approximate, and flush
        assert kernel["flushing"] == kernel["approximate"] == kernel["exponentials"], name
        assert bool(kernel["exponentials"]) == exact, name
        assert not exact or ("mma" in kernel["units"]) == ("fp32" not in name), name
        attends, quantizes = (
            name in ("int8 attention", "int8 attention, mask"),
            name in ("int8 attention: keys", "int8 attention: values"),
        )
        # The FMA of the dual-level sum, the only products that no tensor core makes, and softmax.
        fused = "product, dual" in name or name.endswith("a16 product fp32") or attends or exact
        assert bool(kernel["fused"]) == fused, name
        divides = attends or quantizes or name == "encode mxfp4_dualscale" or name.startswith(("rms_norm", "gelu"))
        assert (kernel["divisions"] > 0) == divides, name
        assert not kernel["spilled"] or "product" in name or attends or (exact and kernel["spilled"] < 100), name
        assert kernel["shared"] <= {80: 99, 90: 227, 100: 227}[arch] << 10, (
            name
        )  # sm_86 and sm_89 have 99 KB and run sm_80's
    unit = {80: "s32.s8.s8.s32", 90: "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", 100: "kind::i8"}[arch]
    assert unit in kernels["int8 product"]["units"] and unit in kernels["int8 product, dual"]["units"]
    unit = unit.replace("n128k32", "n64k32")  # a block of keys
    assert unit in kernels["int8 attention"]["units"] and kernels["int8 attention"]["spilled"] <= 64
    assert "bf16" in kernels["bf16 product"]["units"] or "kind::f16" in kernels["bf16 product"]["units"]
    if arch >= 100:
        assert "kind::mxf4.block_scale.block32" in kernels["fp4 product"]["units"]


def test_formats_of_the_kernels_are_the_registry_s():
    """The kernels know elements by name, and their widths by heart."""
    assert {row.element.name for row in FORMATS.values()} == {"e2m1", "e4m3"}
    assert {row.block for row in FORMATS.values()} == {32} and {row.outer for row in FORMATS.values()} == {
        None,
        triton_codec.GROUP,
    }
