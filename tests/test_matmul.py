"""Matmuls bit for bit, on every path: exact sums, the multiply-add, both against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

import mxdit
import oracle
from agreement import KINDS, dual, exact_values
from mxdit.numerics import reference
from mxdit.numerics.formats import FORMATS

OPS = torch.ops.mxdit
HALF = [torch.bfloat16, torch.float16]
on_every_path = pytest.mark.usefixtures("path")


# -- the multiply-add --------------------------------------------------------------------------------------------------


def hard_multiply_adds() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fp32 (p, s, acc) whose p * s + acc lies a hair beside the middle of two fp32 numbers.

    With P * S = h * 2**24 +- 1 for odd 24-bit P, and acc a 24-bit multiple of 2**30, the sum is about 2**54: the 1 does
    not fit into float64 beside it, and where h * 2**24 is half a unit of acc, that lost 1 decides the rounding.
    """
    generator = np.random.default_rng(11)
    odd = generator.integers(2**23, 2**24, 200_000) | 1
    p, s, acc = [], [], []
    for sign in (1, -1):
        inverse = np.array([pow(int(value), -1, 2**24) for value in odd[:40_000]])
        partner = inverse if sign == 1 else 2**24 - inverse
        product = odd[:40_000].astype(object) * partner
        h = ((product - sign) // 2**24).astype(np.int64)
        good = (h % 64 == 32) & (partner >= 2**20)
        p.append(odd[:40_000][good]), s.append(partner[good])
        acc.append(generator.integers(2**23, 2**24, int(good.sum())) * 2**30)
    columns = [np.concatenate(parts).astype(np.float64) for parts in (p, s, acc)]
    signs = generator.choice([-1.0, 1.0], (2, len(columns[0])))
    scale = np.exp2(generator.integers(-80, 20, len(columns[0])))
    return (
        np.float32(columns[0] * signs[0]),
        np.float32(columns[1] * signs[1] * scale),
        np.float32(columns[2] * generator.choice([-1.0, 1.0], len(scale)) * scale),
    )


def test_fma_rounds_once_where_float64_would_round_twice():
    p, s, acc = hard_multiply_adds()
    got = reference.fma(*(torch.from_numpy(x) for x in (p, s, acc))).numpy()
    expected = [oracle.fma(*triple) for triple in zip(p.tolist(), s.tolist(), acc.tolist(), strict=True)]
    np.testing.assert_array_equal(got, np.float32(expected))
    twice = np.float32(p.astype(np.float64) * s + acc)
    assert len(p) > 500 and (twice != got).sum() > 100, "these cases are not hard"


def test_fma_on_ordinary_extreme_and_tied_values():
    generator = np.random.default_rng(5)

    def some(spread: int) -> np.ndarray:
        return np.float32(generator.standard_normal(3000) * np.exp2(generator.integers(-spread, spread + 1, 3000)))

    p, s, acc = some(40), some(30), some(60)
    acc[:500] = -np.float32(p[:500].astype(np.float64) * s[:500])  # cancels to the product's own rounding error
    p[500:1000], s[500:1000] = p[500:1000] * np.float32(2**-60), s[500:1000] * np.float32(2**-60)  # subnormal results
    acc[500:900] *= np.float32(2**-100)
    p[1000:1500] = generator.integers(-9, 9, 500)
    s[1000:1500] = np.exp2(generator.integers(-30, -20, 500))
    acc[1000:1500] = 1 + generator.integers(0, 9, 500) * 2.0**-23  # exact ties
    got = reference.fma(*(torch.from_numpy(x) for x in (p, s, acc))).numpy()
    expected = [oracle.fma(*triple) for triple in zip(p.tolist(), s.tolist(), acc.tolist(), strict=True)]
    np.testing.assert_array_equal(got, np.float32(expected))


def test_fma_keeps_inf_and_nan():
    big, inf, nan = 3e38, float("inf"), float("nan")
    rows = torch.tensor(
        [[big, 2, 1], [big, -2, 1], [1, 1, inf], [1, 1, -inf], [0, inf, 1], [inf, 1, -inf], [nan, 1, 1]]
    )
    got = reference.fma(*rows.T.contiguous())
    expected = torch.tensor([inf, -inf, inf, -inf, nan, nan, nan])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# -- matmul ------------------------------------------------------------------------------------------------------------


@on_every_path
@pytest.mark.parametrize("out", KINDS, ids=str)
@pytest.mark.parametrize("k", [2, 30, 64, 96, 700])
def test_matmul_is_the_exact_sum_with_one_rounding(k, out):
    a, w = torch.randn(5, k).bfloat16(), torch.randn(7, k).bfloat16()
    bias = torch.randn(7) * 1e-3
    pa, pw = mxdit.encode(a, "mxfp4"), mxdit.encode(w, "mxfp4")
    got = OPS.matmul(pa.codes, pa.scale, pw.codes, pw.scale, bias, "mxfp4", "mxfp4", out)
    va, vw = exact_values(pa.codes, pa.scale, "mxfp4"), exact_values(pw.codes, pw.scale, "mxfp4")
    expected = [[oracle.dot(x, y, b) for y, b in zip(vw, bias.tolist(), strict=True)] for x in va]
    expected = oracle.to_float(np.array(expected), KINDS[out])
    assert got.dtype is out
    np.testing.assert_array_equal(got.double().numpy(), expected)


@on_every_path
def test_matmul_does_not_depend_on_the_order_of_k():
    a, w = torch.randn(33, 1024).bfloat16(), torch.randn(65, 1024).bfloat16()
    order = torch.randperm(32)

    def product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        pa, pw = mxdit.encode(a, "mxfp4"), mxdit.encode(w, "mxfp4")
        return OPS.matmul(pa.codes, pa.scale, pw.codes, pw.scale, None, "mxfp4", "mxfp4", torch.float32)

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), 32, 32)[:, order].reshape(len(x), 1024)

    assert torch.equal(product(a, w), product(shuffled(a), shuffled(w)))


@on_every_path
@pytest.mark.parametrize(("a_fmt", "out"), [("mxfp8", torch.float32), ("mxfp8", torch.bfloat16)])
def test_fp8_products_are_close_to_exact(a_fmt, out):
    """E4M3 sums do not fit 24 bits, so their last bits may differ: relative to the sum of magnitudes, by very little."""
    a, w, bias = torch.randn(9, 1000).bfloat16(), torch.randn(11, 1000).bfloat16(), torch.randn(11)
    pa, pw = mxdit.encode(a, a_fmt), mxdit.encode(w, "mxfp8")
    got = OPS.matmul(pa.codes, pa.scale, pw.codes, pw.scale, bias, a_fmt, "mxfp8", out)
    va, vw = exact_values(pa.codes, pa.scale, a_fmt), exact_values(pw.codes, pw.scale, "mxfp8")
    error = np.abs(got.double().numpy() - (va @ vw.T + bias.double().numpy()))
    bound = (np.abs(va) @ np.abs(vw.T) + 1) * 2.0**-20
    assert (error <= bound + (np.abs(got.double().numpy()) * 2.0**-8 if out is torch.bfloat16 else 0)).all()


@on_every_path
@pytest.mark.parametrize("out", HALF, ids=str)
def test_matmul_of_eight_bit_activations_and_four_bit_weights(out):
    a, w, bias = torch.randn(3, 5, 640).bfloat16(), torch.randn(11, 640).bfloat16(), torch.randn(11).bfloat16()
    pa, pw = mxdit.encode(a, "mxfp8", "ocp"), mxdit.encode(w, "mxfp4")
    got = OPS.matmul(pa.codes, pa.scale, pw.codes, pw.scale, bias, "mxfp8", "mxfp4", out)
    va = exact_values(pa.codes.reshape(15, -1), pa.scale.reshape(15, -1), "mxfp8")
    exact = torch.from_numpy(va @ exact_values(pw.codes, pw.scale, "mxfp4").T) + bias.double()
    assert got.shape == (3, 5, 11) and got.dtype is out
    torch.testing.assert_close(got.double().view(15, 11), exact, rtol=2**-7, atol=2**-10)


def every_weight(fmt: str, codes: np.ndarray, bytes_: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Each of these codes under each of these scale bytes, a weight row each; and their fp32 values, by ml_dtypes."""
    codes, scale = (grid.flatten().astype(np.uint8) for grid in np.meshgrid(codes, bytes_))
    twin = ml_dtypes.float8_e4m3fn if fmt == "mxfp8" else ml_dtypes.float4_e2m1fn
    values = codes.view(twin).astype(np.float64) * scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return torch.from_numpy(codes)[:, None], torch.from_numpy(scale)[:, None], oracle.to_float(values, oracle.FP32)


@on_every_path
@pytest.mark.parametrize("kinds", ["all", "ordinary"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("scheme", "fmt"), [("w4a16", "mxfp4"), ("w8a16", "mxfp8")])
def test_float_activations_meet_every_code_under_every_scale_byte(scheme, fmt, dtype, kinds):
    """Products of one number each, so there is one right result. The ordinary ones are those that no kernel declines."""
    codes, bytes_ = np.arange(16 if fmt == "mxfp4" else 256), np.arange(256)
    if kinds == "ordinary":
        codes, bytes_ = codes[codes % 128 != 127], np.arange(90, 165)
    w, scale, values = every_weight(fmt, codes, bytes_)
    x = torch.tensor([1, -1.5, 1.9921875, 0.0625, -3.140625, 208, -0.0]).to(dtype)[:, None]
    lanes = 2 // FORMATS[fmt].per_byte  # the second of a pair of four-bit codes is zero
    got = OPS.linear(torch.nn.functional.pad(x, (0, 2 - lanes)), w, scale, None, None, None, scheme, "ocp", "packed")
    with np.errstate(invalid="ignore"):
        exact = oracle.to_float(x.double().numpy() * values, oracle.FP32)
    if dtype is not torch.float32:
        limit = torch.finfo(dtype).max
        exact = np.clip(oracle.to_float(np.clip(exact, -limit, limit), KINDS[dtype]), -limit, limit)
    np.testing.assert_array_equal(got.double().numpy(), exact)


@on_every_path
@pytest.mark.parametrize("k", [1, 33, 64, 700])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_eight_bit_weights_and_floats_of_few_bits_are_the_exact_sum(dtype, k):
    """Sums that fit 24 bits in any order: whole numbers of x, elements of one to three binades."""
    x = torch.randint(-15, 16, (9, k)).to(dtype)
    codes = torch.randint(0x30, 0x48, (40, k)).to(torch.uint8) | torch.randint(0, 2, (40, k)).to(torch.uint8) << 7
    scale = torch.randint(126, 128, (40, -(-k // 32))).to(torch.uint8)
    bias = torch.randint(-9, 9, (40,)).float()
    got = OPS.linear(x, codes, scale, None, None, bias, "w8a16", "ocp", "packed")
    exact = x.double().numpy() @ exact_values(codes, scale, "mxfp8").T + bias.double().numpy()
    np.testing.assert_array_equal(got.double().numpy(), oracle.to_float(exact, KINDS[dtype]))


@on_every_path
def test_half_precision_results_saturate():
    x = torch.full((1, 64), 2.0**9).half()
    p = mxdit.encode(x, "mxfp4")
    for sign in (1, -1):
        bias = torch.tensor([sign * 2.0**25])
        got = OPS.matmul(p.codes, p.scale, p.codes, p.scale, bias, "mxfp4", "mxfp4", torch.float16)
        assert got.item() == sign * 65504.0
        assert torch.isfinite(
            OPS.matmul(p.codes, p.scale, p.codes, p.scale, bias, "mxfp4", "mxfp4", torch.float32)
        ).all()
    huge = mxdit.encode(torch.full((1, 64), 2.0**63).bfloat16(), "mxfp4")
    got = OPS.matmul(huge.codes, huge.scale, huge.codes, huge.scale, None, "mxfp4", "mxfp4", torch.bfloat16)
    assert got.item() == torch.finfo(torch.bfloat16).max


# -- dual level --------------------------------------------------------------------------------------------------------


@on_every_path
def test_worked_example_c():
    a, w = torch.zeros(1, 1024), torch.zeros(1, 1024)
    a[0, 0], a[0, 1], a[0, 512] = 6, -3, 1.5
    w[0, 0], w[0, 1], w[0, 512], w[0, 513] = 0.5, 0.25, -2, 7
    (a4, a_l0, a_l1), (w4, w_l0, w_l1) = dual(a.bfloat16()), dual(w.bfloat16())
    assert a_l0.tolist() == [[1.0, 0.25]] and w_l0.tolist() == [[np.float32(0.083333336), np.float32(1.1666667)]]
    assert a4[0, :1].tolist() == [0xD7] and w4[0, [0, 256]].tolist() == [0x57, 0x7B]
    bias = torch.tensor([0.1])
    got = OPS.matmul_dual(a4, w4, a_l0, w_l0, a_l1, w_l1, bias, torch.bfloat16)
    assert got.item() == -0.275390625
    wide = reference.matmul_groups(
        reference.packed_rows(a4, a_l1, "mxfp4"), reference.packed_rows(w4, w_l1, "mxfp4"), 1024, a_l0, w_l0, bias,
        torch.empty(1, 1),
    )  # fmt: skip
    assert np.float32(wide.item()) == np.float32(-0.27500004)


@pytest.mark.slow
@on_every_path
@pytest.mark.parametrize("k", [2, 64, 512, 544, 1536, 2100])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_matmul_dual_is_the_exact_chain(k, dtype):
    a, w, bias = torch.randn(4, k).to(dtype), (torch.randn(6, k) * 0.03).to(dtype), torch.randn(6) * 0.1
    (a4, a_l0, a_l1), (w4, w_l0, w_l1) = dual(a), dual(w)
    va, vw = exact_values(a4, a_l1, "mxfp4"), exact_values(w4, w_l1, "mxfp4")
    outer_a, outer_w = a_l0.tolist(), w_l0.tolist()
    chain = [
        [oracle.dot_groups(va[m], vw[n], outer_a[m], outer_w[n], bias[n].item()) for n in range(6)] for m in range(4)
    ]
    wide = reference.matmul_groups(
        reference.packed_rows(a4, a_l1, "mxfp4"), reference.packed_rows(w4, w_l1, "mxfp4"), k, a_l0, w_l0, bias,
        torch.empty(4, 6),
    )  # fmt: skip
    np.testing.assert_array_equal(wide.numpy(), np.float32(chain))
    for out in HALF:
        got = OPS.matmul_dual(a4, w4, a_l0, w_l0, a_l1, w_l1, bias, out)
        np.testing.assert_array_equal(got.double().numpy(), oracle.to_float(np.array(chain), KINDS[out]))


@on_every_path
def test_dual_results_keep_inf():
    x = torch.full((1, 512), 2.0**12).half()
    codes, l0, l1 = dual(x)
    assert OPS.matmul_dual(codes, codes, l0, l0, l1, l1, None, torch.float16).item() == torch.inf


@on_every_path
def test_pieces_do_not_change_results():
    """A product larger than every piece that the reference works in is its rows one by one."""
    k, n = 4096, 1300
    w, x = torch.randn(n, k).bfloat16(), torch.randn(70, k).bfloat16()
    pw, px = mxdit.encode(w, "mxfp4"), mxdit.encode(x, "mxfp4")
    whole = OPS.matmul(px.codes, px.scale, pw.codes, pw.scale, None, "mxfp4", "mxfp4", torch.float32)
    (x4, x0, x1), (w4, w0, w1) = dual(x), dual(w)
    whole_dual = OPS.matmul_dual(x4, w4, x0, w0, x1, w1, None, torch.bfloat16)
    for i, j in ((0, 0), (69, 1023), (33, 1024), (1, 1299)):
        one = OPS.matmul(
            px.codes[i], px.scale[i], pw.codes[j : j + 1], pw.scale[j : j + 1], None, "mxfp4", "mxfp4", torch.float32
        )
        assert torch.equal(one, whole[i, j : j + 1])
        one = OPS.matmul_dual(x4[i], w4[j : j + 1], x0[i], w0[j : j + 1], x1[i], w1[j : j + 1], None, torch.bfloat16)
        assert torch.equal(one, whole_dual[i, j : j + 1])


def test_exact_partial_sums_are_what_they_claim():
    """The oracle's own footing: a sum of E2M1 products under ordinary scales is exact in fp32."""
    a, w = torch.randn(1, 512).bfloat16(), torch.randn(1, 512).bfloat16()
    (a4, _, a1), (w4, _, w1) = dual(a), dual(w)
    exact = sum(
        Fraction(x) * Fraction(y)
        for x, y in zip(
            exact_values(a4, a1, "mxfp4")[0].tolist(), exact_values(w4, w1, "mxfp4")[0].tolist(), strict=True
        )
    )
    assert Fraction(oracle.fraction_to_float(exact, oracle.FP32)) == exact
