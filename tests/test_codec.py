"""The codec against docs/numerics.md: worked examples, special blocks, shapes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import mxdit
from agreement import KINDS, assert_as_dual_oracle, assert_as_oracle
from mxdit.numerics.formats import FORMATS

# -- worked examples, as literals --------------------------------------------------------------------------------------

A = [7, -6.5, 5, -3.5, 2.5, 1.75, -1.25, 0.75, 0.25, -0.25, 0.1, -0.0] + [0] * 20


@pytest.mark.parametrize(
    ("rule", "mode", "scale", "head", "values"),
    [
        ("ocp", "rint", 0x7F, "F7E6442A8080", [6, -6, 4, -4, 2, 2, -1, 1, 0, -0.0, 0, -0.0]),
        ("ocp", "round", 0x7F, "F7E7452B9180", [6, -6, 6, -4, 3, 2, -1.5, 1, 0.5, -0.5, 0, -0.0]),
        ("ocp", "floor", 0x7F, "F7E6341B9080", [6, -6, 4, -4, 2, 1.5, -1.5, 0.5, 0, -0.5, 0, -0.0]),
        ("even6", "rint", 0x80, "D6C422198080", [8, -6, 4, -4, 2, 2, -1, 1, 0, -0.0, 0, -0.0]),
        ("even7", "rint", 0x7F, "F7E6442A8080", [6, -6, 4, -4, 2, 2, -1, 1, 0, -0.0, 0, -0.0]),
        ("uos", "rint", 0x7F, "F7E6442A8080", [6, -6, 4, -4, 2, 2, -1, 1, 0, -0.0, 0, -0.0]),
    ],
)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_worked_example_a(dtype, rule, mode, scale, head, values):
    x = torch.tensor(A).bfloat16().to(dtype)
    packed = mxdit.encode(x, "mxfp4", rule, mode)
    assert packed.scale.tolist() == [scale]
    assert bytes(packed.codes.tolist()) == bytes.fromhex(head) + bytes(10)
    decoded = mxdit.decode(packed)[:12].tolist()
    assert decoded == values and [str(v) for v in decoded] == [str(float(v)) for v in values]  # signs of zero too


@pytest.mark.parametrize(("rule", "scale"), [("ocp", 0x7F), ("even7", 0x80), ("uos", 0x80)])
def test_worked_example_a_with_a_larger_maximum(rule, scale):
    x = torch.tensor([7.5, *A[1:]], dtype=torch.bfloat16)
    assert mxdit.encode(x, "mxfp4", rule).scale.tolist() == [scale]


@pytest.mark.parametrize("rule", ["ocp", "cublas"])
def test_worked_example_a_in_fp8(rule):
    packed = mxdit.encode(torch.tensor([0.0, 8, 64, 512] + [0] * 28).bfloat16(), "mxfp8", rule)
    assert packed.scale.tolist() == [0x80] and bytes(packed.codes.tolist()) == bytes.fromhex("00486078") + bytes(28)


def test_worked_example_b():
    x, smooth = torch.zeros(64), torch.ones(64)
    x[:6] = torch.tensor([7, -2.9, 1.2, 0.4, -0.05, 0.3])
    x[32:36] = torch.tensor([0.02, -0.013, 0.005, 0.001])
    smooth[1], smooth[3] = 1.1, 0.3333
    packed = mxdit.encode(x.bfloat16(), "mxfp4_dualscale", mul_scale=smooth.bfloat16())
    assert packed.outer is not None and packed.outer.view(torch.int32).tolist() == [0x3F955556]
    assert packed.scale.tolist() == [0x7F, 0x77]
    expected = bytes.fromhex("D70218") + bytes(13) + bytes.fromhex("D602") + bytes(14)
    assert bytes(packed.codes.tolist()) == expected
    values = mxdit.decode(packed)[[0, 1, 2, 3, 4, 5, 32, 33, 34, 35]].tolist()
    np.testing.assert_array_equal(
        np.float32(values),
        np.float32([7.0000005, -3.5000002, 1.1666667, 0, -0.0, 0.5833334, 0.018229168, -0.013671876, 0.004557292, 0]),
    )


def test_vendor_vector():
    packed = mxdit.encode(torch.full((1, 512), 8.0, dtype=torch.bfloat16), "mxfp4_dualscale")
    assert packed.outer is not None
    assert packed.codes.tolist() == [[0x77] * 256] and packed.scale.tolist() == [[127] * 16]
    assert packed.outer.tolist() == [[np.float32(1.3333334)]]


# -- blocks that are not ordinary --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8"])
def test_a_block_with_inf_or_nan_is_nan_and_its_neighbors_are_not(dtype, bad, fmt):
    x = torch.randn(2, 96).to(dtype)
    clean = mxdit.encode(x, fmt)
    x[1, 40] = bad
    packed = mxdit.encode(x, fmt)
    width = 32 // packed.format.per_byte
    assert int(packed.scale[1, 1]) == 0xFF and not packed.codes[1, width : 2 * width].any()
    assert torch.isnan(mxdit.decode(packed)[1, 32:64]).all()
    packed.codes[1, width : 2 * width], packed.scale[1, 1] = clean.codes[1, width : 2 * width], clean.scale[1, 1]
    assert torch.equal(packed.codes, clean.codes) and torch.equal(packed.scale, clean.scale)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_dual_maximum_leaves_inf_and_nan_out(bad):
    x = torch.randn(1, 512).bfloat16()
    x[0, 100], x[0, 101] = bad, 0.0
    packed = mxdit.encode(x, "mxfp4_dualscale")
    finite = x.clone()
    finite[0, 100] = 0
    clean = mxdit.encode(finite, "mxfp4_dualscale")
    assert packed.outer is not None and clean.outer is not None and torch.equal(packed.outer, clean.outer)
    assert packed.scale[0].tolist() == [0xFF if i == 3 else b for i, b in enumerate(clean.scale[0].tolist())]
    assert_as_dual_oracle(x, "rint")


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_keep_their_sign_under_scale_zero(fmt):
    x = torch.tensor([0.0, -0.0] * 33, dtype=torch.bfloat16)
    packed = mxdit.encode(x, fmt)
    assert not packed.scale.any() and (packed.outer is None or not packed.outer.any())
    decoded = mxdit.decode(packed)
    assert not decoded.any() and torch.equal(torch.signbit(decoded), torch.signbit(x))


def test_dual_level_zero_that_underflows_makes_nan_blocks():
    x = torch.zeros(1, 512, dtype=torch.bfloat16)
    x[0, 33] = 2.0**-126  # times fl(1/6) this is subnormal, so level 0 is flushed and the quotient is inf
    packed = mxdit.encode(x, "mxfp4_dualscale")
    assert packed.outer is not None and packed.outer.tolist() == [[0.0]]
    assert packed.scale[0].tolist() == [0, 255] + [0] * 14 and not packed.codes.any()


# -- shapes ------------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 600)).map(lambda s: (*s[0], 2 * s[1]))
dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@given(shape=shapes, dtype=dtypes, fmt=st.sampled_from(sorted(FORMATS)), seed=st.integers(0, 2**31))
def test_any_shape(shape, dtype, fmt, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    packed = mxdit.encode(x, fmt)
    row, k = FORMATS[fmt], shape[-1]
    assert packed.shape == x.shape
    assert packed.codes.shape == (*shape[:-1], k // row.per_byte)
    assert packed.scale.shape == (*shape[:-1], -(-k // 32))
    assert packed.nbytes == row.nbytes(x.numel() // k, k)
    if packed.outer is None:
        assert row.outer is None
        if x.numel():
            assert_as_oracle(x.reshape(-1, k), fmt, row.default_rule, "rint")
    else:
        assert packed.outer.shape == (*shape[:-1], -(-k // 512))
        if x.numel():
            assert_as_dual_oracle(x.reshape(-1, k), "rint")
    decoded = mxdit.decode(packed, dtype)
    assert decoded.shape == x.shape and decoded.dtype is dtype


@given(
    setting=st.sampled_from([("mxfp4", "ocp"), ("mxfp4", "uos"), ("mxfp8", "ocp")]),
    blocks=st.integers(1, 9),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_decoded_values_encode_to_themselves(setting, blocks, exponent, seed):
    x = torch.randn(3, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    packed = mxdit.encode(x, *setting)
    again = mxdit.encode(mxdit.decode(packed), *setting)
    assert torch.equal(packed.codes, again.codes) and torch.equal(packed.scale, again.scale)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("mode", ["rint"])
def test_rows_do_not_know_of_each_other(fmt, mode):
    """More elements than one chunk holds, from memory that is not contiguous, are the rows one by one."""
    x = torch.randn(2048, 420).bfloat16().T
    assert x.numel() > 3 * 2**18 and not x.is_contiguous()
    whole = mxdit.encode(x, fmt, round_mode=mode)
    decoded = mxdit.decode(whole)
    for i in (0, 127, 128, 129, 419):
        alone = mxdit.encode(x[i], fmt, round_mode=mode)
        assert torch.equal(alone.codes, whole.codes[i]) and torch.equal(alone.scale, whole.scale[i])
        assert torch.equal(mxdit.decode(alone), decoded[i])


def test_encode_leaves_its_input_alone():
    for dtype in KINDS:
        x = torch.randn(4, 64).to(dtype)
        copy = x.clone()
        mxdit.encode(x, "mxfp4")
        mxdit.encode(x, "mxfp8")
        if dtype is not torch.float32:
            mxdit.encode(x, "mxfp4_dualscale")
        assert torch.equal(x, copy)


def test_mul_scale_is_one_product_in_the_inputs_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        x, scale = torch.randn(16, 1056).to(dtype), (torch.rand(1056) * 3).to(dtype)
        assert_as_dual_oracle(x, "rint", scale)
        wide = mxdit.encode(x, "mxfp4_dualscale", mul_scale=scale.float())
        assert torch.equal(wide.codes, mxdit.encode(x, "mxfp4_dualscale", mul_scale=scale).codes)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("rule", FORMATS["mxfp4"].rules)
def test_mul_scale_of_a_single_level_comes_before_all_else(dtype, rule):
    """By the oracle, whose product is rounded to the dtype once; an inf or NaN of either is its block's."""
    x, scale = torch.randn(16, 1056).to(dtype), (torch.rand(1056) * 3).bfloat16().float()
    x[3, 40], x[4, 1050] = torch.inf, torch.finfo(dtype).max
    scale[1050] = 2
    for mode in FORMATS["mxfp4"].round_modes:
        assert_as_oracle(x, "mxfp4", rule, mode, scale)
    packed, plain = mxdit.encode(x, "mxfp4", rule, mul_scale=scale), mxdit.encode(x, "mxfp4", rule)
    assert not torch.equal(packed.codes, plain.codes)
    assert packed.scale[3, 1] == packed.scale[4, 32] == 0xFF != plain.scale[4, 32]


# -- errors ------------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mxdit.encode(X, "mxfp5"), ["unknown format", "'mxfp5'", "mxfp4_dualscale"]),
        (lambda: mxdit.encode(X, "mxfp4", "cublas"), ["mxfp4", "'cublas'", "uos or even6"]),
        (lambda: mxdit.encode(X, "mxfp8", "uos"), ["mxfp8", "'uos'", "ocp or cublas"]),
        (lambda: mxdit.encode(X, "mxfp8", round_mode="floor"), ["rounding mode", "'floor'", "rint"]),
        (lambda: mxdit.encode(X, "mxfp4_dualscale", "uos"), ["mxfp4_dualscale", "'uos'", "ocp"]),
        (lambda: mxdit.encode(X.float(), "mxfp4_dualscale"), ["torch.float32", "torch.bfloat16", "section 3.1"]),
        (lambda: mxdit.encode(X.double(), "mxfp4"), ["torch.float64", "torch.bfloat16 or torch.float16"]),
        (lambda: mxdit.encode(X[:, :63], "mxfp4"), ["(4, 63)", "even"]),
        (lambda: mxdit.encode(X[0, 0], "mxfp8"), ["shape ()"]),
        (lambda: mxdit.encode(X, "mxfp8", mul_scale=torch.ones(64)), ["mxfp8 takes no mul_scale", "four-bit"]),
        (lambda: mxdit.encode(X, "mxfp4", mul_scale=torch.ones(32)), ["(32,)", "(64,)"]),
        (lambda: mxdit.encode(X, "mxfp4_dualscale", mul_scale=torch.ones(32)), ["(32,)", "(64,)"]),
        (lambda: mxdit.decode(mxdit.Packed(X, X, None, "mxfp4")), ["codes", "torch.bfloat16", "torch.uint8"]),
        (lambda: mxdit.decode(mxdit.encode(X, "mxfp4"), torch.int8), ["torch.int8", "torch.float32"]),
    ],
)
def test_errors_say_what_and_what_else(call, words):
    with pytest.raises(mxdit.FormatError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_parts_that_do_not_fit_each_other():
    good = mxdit.encode(X, "mxfp4_dualscale")
    assert good.outer is not None
    for parts, words in (
        ((good.codes, good.scale[:, :1], good.outer), ["scales do not fit", "(4, 2)"]),
        ((good.codes, good.scale, None), ["needs an outer scale"]),
        ((good.codes, good.scale, good.outer.bfloat16()), ["torch.bfloat16", "torch.float32"]),
        ((good.codes, good.scale, good.outer.repeat(1, 2)), ["(4, 2)", "(4, 1)"]),
    ):
        with pytest.raises(mxdit.FormatError) as caught:
            mxdit.decode(mxdit.Packed(*parts, "mxfp4_dualscale"))
        assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(mxdit.FormatError, match="no outer scale"):
        mxdit.decode(mxdit.Packed(good.codes, good.scale, good.outer, "mxfp4"))


@pytest.mark.slow
def test_decoding_first_in_a_special_mode_leaves_nothing_behind():
    packed = mxdit.encode(torch.randn(2, 64), "mxfp4")
    expected = mxdit.decode(packed)
    with torch.inference_mode():
        assert torch.equal(mxdit.decode(packed), expected)
    with FakeTensorMode() as mode:
        parts = [mode.from_tensor(packed.codes), mode.from_tensor(packed.scale)]
        assert mxdit.decode(mxdit.Packed(*parts, None, "mxfp4")).shape == (2, 64)
    assert torch.equal(mxdit.decode(packed), expected)
