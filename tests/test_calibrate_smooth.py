"""Smoothing factors, and the other weights and biases that make up for rounded activations: against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mxdit.calibrate.smooth import EXPONENTS, LIMIT, Smoothing, best, candidates, mul_scale
from mxdit.calibrate.targets import corrected_bias, regression_target


def test_there_are_22_candidates_and_the_first_is_none():
    found = list(candidates(torch.randn(64, 96), torch.randn(8, 96)))
    assert len(found) == len({name for name, _ in found}) == 22
    assert found[0] == Smoothing("none", None) and all(m is not None for _, m in found[1:])
    assert all(m.dtype is torch.float32 and torch.equal(m, m.bfloat16().float()) for _, m in found[1:])


@pytest.mark.parametrize("rows", (1, 40, 3000))
def test_a_candidate_is_what_its_name_says(rows):
    x, weight = torch.randn(rows, 96) * torch.exp2(torch.randn(96)), torch.randn(8, 96) * torch.exp2(torch.randn(96))
    ordered = np.sort(abs(x.double().numpy()), axis=0)[::-1]
    statistics = {
        "rms": np.sqrt((ordered**2).mean(0)),
        "max": ordered[0],
        "p99.9": ordered[min(rows - 1, max(1, round(rows / 1000)))],  # so many are above it
    }
    of_weight = np.sqrt((weight.double().numpy() ** 2).mean(0))
    named = dict(candidates(x.bfloat16() if rows == 1 else x, weight))
    for name, statistic in statistics.items():
        for a, b in EXPONENTS:
            s = (statistic**a) / of_weight**b
            want = np.exp(np.log(s).mean()) / s
            got = named[f"{name}^{a:g}/w^{b:g}"].double().numpy()
            np.testing.assert_allclose(got, want, rtol=2.0**-7)  # bf16, of a statistic in bf16


def test_factors_have_the_geometric_mean_one_and_even_out_channels():
    of_input, of_weight = torch.exp2(torch.randn(256) * 2), torch.exp2(torch.randn(256))
    m = mul_scale(of_input, of_weight, 0.5, 0.25)
    assert abs(float(m.double().log2().mean())) < 2.0**-8
    assert float((of_input * m).log2().std()) < float(of_input.log2().std())
    assert float((of_weight / m).log2().std()) > float(of_weight.log2().std())
    assert torch.equal(m, mul_scale(of_input * 64, of_weight * 8, 0.5, 0.25))


def test_dead_channels_have_the_factor_one_and_change_no_other():
    of_input, of_weight = torch.rand(64) + 0.1, torch.rand(64) + 0.1
    alive = torch.ones(64, dtype=torch.bool)
    alive[[3, 9]] = False
    want = mul_scale(of_input[alive], of_weight[alive], 0.5, 0.5)
    of_input[3], of_weight[9] = 0, 0
    m = mul_scale(of_input, of_weight, 0.5, 0.5)
    assert m[~alive].tolist() == [1, 1] and torch.equal(m[alive], want)
    assert torch.equal(mul_scale(torch.zeros(8), torch.zeros(8), 0.5, 0.5), torch.ones(8))


def test_factors_are_clamped():
    of_input = torch.ones(64)
    of_input[0], of_input[1] = 1e12, 1e-12
    m = mul_scale(of_input, torch.ones(64), 0.75, 0.0)
    assert float(m[0]) == 1 / LIMIT and float(m[1]) == LIMIT and m[2:].tolist() == [1] * 62


def test_the_best_is_the_first_with_the_least_error():
    options = [Smoothing(name, torch.full((4,), float(i))) for i, name in enumerate("abcd")]
    errors = dict(zip("abcd", (3.0, 1.0, 2.0, 1.0), strict=True))
    chosen, found = best(iter(options), lambda m: list(errors.values())[int(m[0])])
    assert chosen is options[1] and found == errors


# -- other weights ---------------------------------------------------------------------------------------------------------


def inputs(k: int = 48, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and what rounding might make of them."""
    random = np.random.default_rng(1)
    x = random.normal(size=(rows, k)) @ random.normal(size=(k, k)) / k**0.5
    return x, np.round(x * 1.1 + 0.1)


def moments(x: np.ndarray, rounded: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hessian, and the cross term."""
    return tuple(torch.from_numpy(m / len(x)) for m in (rounded.T @ rounded, (x - rounded).T @ rounded))


def test_the_regression_s_target_is_the_least_squares_solution():
    x, rounded = inputs()
    weight = torch.randn(6, 48).double()
    got = regression_target(weight, *moments(x, rounded), 0.0)
    want = np.linalg.lstsq(rounded, x @ weight.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(got.numpy(), want)


def test_the_regression_is_held_to_the_weight_by_lam():
    x, rounded = inputs()
    weight = torch.randn(6, 48).double()
    hessian, cross = moments(x, rounded)
    lam, mean = 0.3, float(hessian.diagonal().mean())
    held = np.concatenate([rounded, np.sqrt(lam * mean * len(x)) * np.eye(48)])
    wanted = np.concatenate([x @ weight.numpy().T, np.sqrt(lam * mean * len(x)) * weight.numpy().T])
    want = np.linalg.lstsq(held, wanted, rcond=None)[0].T
    np.testing.assert_allclose(regression_target(weight, hessian, cross, lam).numpy(), want)


def test_channels_that_no_input_reached_keep_their_weight():
    x, rounded = inputs()
    x[:, 7], rounded[:, 7] = 0, 0
    weight = torch.randn(6, 48).double()
    got = regression_target(weight, *moments(x, rounded), 0.1)
    assert torch.equal(got[:, 7], weight[:, 7]) and not torch.equal(got[:, 8], weight[:, 8])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_corrected_bias_leaves_no_mean_error(dtype):
    exact = torch.randn(200, 12)
    given, bias = exact + 0.3 * torch.randn(200, 12) + torch.randn(12), torch.randn(12).to(dtype)
    corrected = corrected_bias(bias, exact, given)
    assert corrected.dtype is dtype
    left = exact - (given + (corrected.float() - bias.float()))
    assert float(left.mean(0).abs().max()) <= 8 * torch.finfo(dtype).eps
    fresh = corrected_bias(None, exact.to(dtype), given)
    assert fresh.dtype is dtype
    assert float((exact.to(dtype).float() - given - fresh.float()).mean(0).abs().max()) <= 8 * torch.finfo(dtype).eps
