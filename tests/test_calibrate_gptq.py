"""GPTQ against the search that it begins with, and against the algorithm written down a second time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mxdit
import oracle
from mxdit.calibrate.gptq import DAMPING, gptq, inverse_factor
from mxdit.calibrate.scales import AROUND, PER_OCTAVE, search
from mxdit.errors import InputError
from mxdit.numerics.formats import FORMATS, block_format

formats = pytest.mark.parametrize("fmt", FORMATS)


def correlated(k: int, rows: int | None = None) -> torch.Tensor:
    """The Hessian of inputs whose channels are related and differ in size."""
    rows = rows or 3 * k
    x = torch.randn(rows, k // 4) @ torch.randn(k // 4, k) / k**0.5 + 0.3 * torch.randn(rows, k)
    x *= torch.exp2(torch.randn(k))
    return x.mT @ x / rows


def quadratic(weight: torch.Tensor, packed: mxdit.Packed, hessian: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row, float64."""
    d = weight.double() - mxdit.decode(packed).double()
    return ((d @ hessian.double()) * d).sum(-1)


def singles(packed: mxdit.Packed) -> np.ndarray:
    """Codes, one a byte."""
    codes = packed.codes.numpy()
    return oracle.unpack(codes) if packed.format.per_byte == 2 else codes


# -- a second implementation: row by row, the inverse brought up to date by elimination, as Optimal Brain Surgeon has it ----


def rounded(v: np.ndarray, fmt: str) -> np.ndarray:
    grid = oracle.GRIDS[fmt]
    codes = oracle.codes_of(v, grid, "rint")
    return np.copysign(grid[codes % (8 if len(grid) == 8 else 128)], v)


def best_scale(block: np.ndarray, counts: np.ndarray, fmt: str) -> tuple[float, float]:
    """The power of two that leaves a block the least error, and that error."""
    floor = int(oracle.exponent(abs(block).max())) - oracle.EMAX[fmt]
    tried = [2.0 ** (floor + step) for step in AROUND]
    errors = [(((rounded(block / s, fmt) * s - block) ** 2) * counts).sum() for s in tried]
    return tried[int(np.argmin(errors))], min(errors)


def naive(weight: np.ndarray, hessian: np.ndarray, fmt: str) -> np.ndarray:
    """What `gptq` should make of a weight, in float64."""
    row, k = block_format(fmt), weight.shape[1]
    counts, result = hessian.diagonal(), weight.copy()
    first_inverse = np.linalg.inv(hessian + DAMPING * counts.mean() * np.eye(k))
    for w in result:
        inverse, scale, outer = first_inverse.copy(), 1.0, 1.0
        for c in range(k):
            if row.outer and c % row.outer == 0:
                group, of = w[c : c + row.outer].copy(), counts[c : c + row.outer]
                tops = [abs(group).max() / 6 * 2.0 ** (-s / PER_OCTAVE) for s in range(PER_OCTAVE)]
                errors = [
                    sum(best_scale(group[b : b + 32] / top, of[b : b + 32], fmt)[1] for b in range(0, len(group), 32))
                    * top**2
                    for top in tops
                ]
                outer = tops[int(np.argmin(errors))]
            if c % 32 == 0:
                scale, _ = best_scale(w[c : c + 32] / outer, counts[c : c + 32], fmt)
            value = rounded(w[c] / outer / scale, fmt) * scale * outer
            w[c + 1 :] -= (w[c] - value) / inverse[c, c] * inverse[c, c + 1 :]
            w[c] = value
            inverse[c + 1 :, c + 1 :] -= np.outer(inverse[c + 1 :, c], inverse[c, c + 1 :]) / inverse[c, c]
    return result


# -- what it is held to ----------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("k", (32, 96, 576, 1056))
def test_of_independent_channels_nothing_is_carried_over(fmt, k):
    weight, importance = torch.randn(6, k), torch.exp2(torch.randn(k))
    weight[2], weight[3, :32], importance[5] = 0, 0, 0
    hessian = importance.diag()
    ours, plain = gptq(weight, hessian, inverse_factor(hessian)[0], fmt), search(weight, importance, fmt)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)
    assert ours.outer is None or torch.equal(ours.outer, plain.outer)


@formats
@pytest.mark.parametrize("k", (96, 576, 1056))
def test_of_related_channels_the_error_is_lower_than_by_rounding(fmt, k):
    weight, hessian = torch.randn(32, k), correlated(k)
    kept, held = weight.clone(), hessian.clone()
    ours = gptq(weight, hessian, inverse_factor(hessian)[0], fmt)
    assert torch.equal(weight, kept) and torch.equal(hessian, held)
    ours, plain = (quadratic(weight, p, hessian) for p in (ours, search(weight, hessian.diagonal(), fmt)))
    assert bool((ours < plain).all()) and float(ours.sum() / plain.sum()) < 0.8


@pytest.mark.slow
@formats
@pytest.mark.parametrize("k", (64, 80, 544))
def test_it_does_what_the_algorithm_says(fmt, k):
    weight, hessian = torch.randn(3, k), correlated(k)
    ours = gptq(weight, hessian, inverse_factor(hessian)[0], fmt)
    want = torch.from_numpy(naive(weight.double().numpy(), hessian.double().numpy(), fmt))
    same = mxdit.decode(ours).double().sub(want).abs() <= 1e-5 * want.abs()
    # A tie that fp32 decides otherwise moves what comes behind it.
    assert float(same.double().mean()) > 0.97
    d = weight.double() - want
    theirs = ((d @ hessian.double()) * d).sum()
    assert abs(float(quadratic(weight, ours, hessian).sum() / theirs) - 1) < 0.01


@formats
def test_linears_below_each_other_are_rounded_as_alone(fmt):
    weight, hessian = torch.randn(12, 576), correlated(576)
    factor, _ = inverse_factor(hessian)
    whole, alone = gptq(weight, hessian, factor, fmt), gptq(weight[4:9], hessian, factor, fmt)
    same = singles(whole)[4:9] == singles(alone)
    assert same.mean() > 0.99  # products of other shapes may sum in another order


# -- the factor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("damping", (0.001, DAMPING, 0.1))
def test_the_factor_s_square_is_the_inverse(dtype, damping):
    hessian = correlated(96).to(dtype)
    upper, took = inverse_factor(hessian, damping)
    assert took == damping and upper.dtype == dtype
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    eye = np.eye(96)
    damped = hessian.double().numpy() + damping * hessian.double().diagonal().mean().item() * eye
    product = upper.double().mT.numpy() @ upper.double().numpy() @ damped
    np.testing.assert_allclose(product, eye, atol=2.0**10 * torch.finfo(dtype).eps)


def test_a_singular_hessian_is_damped():
    x = torch.randn(10, 64)
    upper, took = inverse_factor(x.mT @ x / 10)
    assert took == DAMPING and bool(torch.isfinite(upper).all())


def test_a_hessian_that_needs_more_damping_gets_it_and_says_so():
    vectors = torch.linalg.qr(torch.randn(64, 64).double()).Q
    values = torch.ones(64).double()
    values[0] = -0.05  # not even positive: what rounding makes of sums of large inputs
    broken = ((vectors * values) @ vectors.mT).float()
    upper, took = inverse_factor(broken)
    assert took == pytest.approx(0.1) and bool(torch.isfinite(upper).all())
    assert inverse_factor(broken, 0.1)[1] == 0.1


def test_a_hessian_that_nothing_helps_is_refused():
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(InputError, match="cannot be inverted"):
        inverse_factor(hessian)


def test_channels_that_no_input_reached_are_rounded_to_nearest():
    weight, hessian = torch.randn(8, 96), correlated(96)
    hessian[40], hessian[:, 40] = 0, 0
    upper, took = inverse_factor(hessian)
    assert took == DAMPING and not bool(upper[40, 41:].any()) and not bool(upper[:40, 40].any())
    mean = hessian.diagonal().mean()
    assert float(upper[40, 40]) == pytest.approx(float(mean) ** -0.5)
    packed = gptq(weight, hessian, upper, "mxfp8")
    scale = torch.exp2(packed.scale[:, 1] - 127.0).double().numpy()
    want = rounded(weight[:, 40].double().numpy() / scale, "mxfp8") * scale
    assert np.array_equal(mxdit.decode(packed)[:, 40].double().numpy(), want)


def test_without_any_input_a_weight_is_rounded_to_nearest():
    nothing = torch.zeros(64, 64)
    upper, took = inverse_factor(nothing)
    assert torch.equal(upper, torch.eye(64)) and took == DAMPING
    weight = torch.randn(4, 64)
    packed = gptq(weight, nothing, upper, "mxfp4")
    assert torch.equal(packed.codes, mxdit.encode(weight, "mxfp4", "ocp").codes)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_hessian_of_no_numbers_is_refused(bad):
    hessian = torch.eye(32)
    hessian[3, 5] = bad
    with pytest.raises(InputError, match="infs or NaNs"):
        inverse_factor(hessian)
