"""Searched scales: against every candidate in float64, and never behind the format's own rule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import mxdit
import oracle
from mxdit.calibrate.scales import AROUND, PER_OCTAVE, best_bytes, best_outer, nearest, packed_of, refit, search
from mxdit.numerics.codec import element_values
from mxdit.numerics.formats import E2M1, E4M3, FORMATS, block_format

WIDTHS = (32, 96, 512, 576, 1056)
formats = pytest.mark.parametrize("fmt", FORMATS)


def signed(element) -> np.ndarray:
    """The element's values in code order, without NaNs."""
    values = np.array(element_values(element))
    return values[~np.isnan(values)]


def rounded(v: np.ndarray, fmt: str) -> np.ndarray:
    """v (float64) to the nearest value of a format's element, by the oracle."""
    grid = oracle.GRIDS[fmt]
    codes = oracle.codes_of(v, grid, "rint")
    return np.copysign(grid[codes % (8 if len(grid) == 8 else 128)], v)


def error_under(blocks: np.ndarray, importance: np.ndarray, byte: np.ndarray, fmt: str) -> np.ndarray:
    """Weighted squared error (..., B) in float64 of blocks (..., B, 32) under bytes (..., B)."""
    scale = np.ldexp(1.0, byte - 127)[..., None]
    return ((rounded(blocks / scale, fmt) * scale - blocks) ** 2 * importance).sum(-1)


def weighted(weight: torch.Tensor, packed: mxdit.Packed, importance: torch.Tensor) -> np.ndarray:
    """Weighted squared error of each row in float64."""
    difference = (mxdit.decode(packed).double() - weight.double()).numpy()
    return (difference**2 * importance.double().numpy()).sum(-1)


def correlated(k: int, rows: int | None = None) -> torch.Tensor:
    """The Hessian of inputs whose channels are related and differ in size."""
    rows = rows or 2 * k
    x = torch.randn(rows, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
    x *= torch.exp2(torch.arange(k) % 5 - 2.0)
    return x.mT @ x / rows


# -- values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", (E2M1, E4M3), ids=str)
def test_nearest_is_the_nearest_of_all_values(element):
    grid = np.unique(signed(element))
    middle = (grid[1:] + grid[:-1]) / 2  # ties; beside them what is hardly none
    hard = np.concatenate([grid, middle, [1e-30, -1e-30, 7, -1e30, 3e38, np.inf, -np.inf]]).astype(np.float32)
    v = np.concatenate([hard, np.nextafter(hard, np.float32(np.inf)), np.nextafter(hard, -np.float32(np.inf))])
    v = np.concatenate([v, np.random.default_rng(0).normal(size=2000).astype(np.float32) * element.max / 3])
    got = nearest(torch.from_numpy(v.copy()), element).double().numpy()
    distance = abs(np.clip(v.astype(float), grid[0], grid[-1])[:, None] - grid)
    least = distance.min(1)
    assert np.array_equal(abs(got - np.clip(v.astype(float), grid[0], grid[-1])), least)
    codes = [
        [c % (1 << (element.bits - 1)) for c, value in enumerate(element_values(element)) if value == g] for g in got
    ]
    tied = (distance == least[:, None]).sum(1) > 1
    assert tied.sum() >= len(middle) and all(codes[i][0] % 2 == 0 for i in np.flatnonzero(tied))


@formats
def test_packed_values_decode_to_themselves(fmt):
    row, k = block_format(fmt), 576
    byte = torch.randint(1, 254, (3, row.blocks(k)), dtype=torch.int32)
    values = torch.tensor(signed(row.element), dtype=torch.float32)
    inner = values[torch.randint(len(values), (3, k))]
    inner *= torch.exp2(byte - 127.0).repeat_interleave(32, -1)
    inner[0, :32] = 0
    inner[torch.isinf(inner)] = 0  # the largest bytes' largest codes are none
    outer = torch.rand(3, row.groups(k)) + 0.5 if row.outer else None
    packed = packed_of(inner, byte, outer, fmt)
    assert torch.equal(packed.scale, byte.to(torch.uint8))
    one = packed if outer is None else mxdit.Packed(packed.codes, packed.scale, torch.ones_like(outer), fmt)
    assert torch.equal(mxdit.decode(one), inner)
    assert outer is None or torch.equal(packed.outer, outer)


# -- bytes and outer scales ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ("mxfp4", "mxfp8"))
@pytest.mark.parametrize("size", (1.0, 1e-25, 1e25))
@pytest.mark.parametrize("equal", (True, False))
def test_the_best_byte_is_the_best_of_all(fmt, size, equal):
    blocks = torch.randn(20, 3, 32) * torch.exp2(torch.randn(20, 3, 1) * 3) * size
    blocks[:4] = blocks[:4].sign() * torch.tensor([4.5, 5.5, 6.5, 7.5]).view(4, 1, 1) * size  # one magnitude
    importance = torch.ones(3, 32) if equal else torch.rand(3, 32) ** 4
    byte, error = best_bytes(blocks, importance, block_format(fmt))
    exact, counts = blocks.double().numpy(), importance.double().numpy()
    floor = oracle.exponent(abs(exact).max(-1)) + 127 - oracle.EMAX[fmt]
    steps = range(-6, 7) if equal else sorted(AROUND)  # further ones gain only where a large weight hardly counts
    every = np.stack([error_under(exact, counts, floor + step, fmt) for step in steps])
    ours = error_under(exact, counts, byte.numpy(), fmt)
    np.testing.assert_allclose(ours, every.min(0))
    if size == 1:
        np.testing.assert_allclose(error.numpy(), ours, rtol=1e-5)


def test_a_clipped_maximum_is_chosen_where_the_rest_matters_more():
    block = torch.tensor([8.0] + [0.375] * 31).view(1, 1, 32)
    row = block_format("mxfp4")
    equal, _ = best_bytes(block, torch.ones(1, 32), row)
    rest, _ = best_bytes(block, torch.tensor([[1e-3] + [1.0] * 31]), row)
    assert int(rest) < int(equal)


def test_of_equal_errors_nothing_is_clipped():
    blocks = torch.randn(5, 1, 32)
    byte, _ = best_bytes(blocks, torch.zeros(1, 32), block_format("mxfp4"))
    assert bool((blocks.abs().amax(-1) < torch.exp2(byte - 127.0) * 8).all())


@pytest.mark.parametrize("size", (1.0, 1e-30, 1e30))
def test_the_best_outer_scale_is_the_best_of_its_candidates(size):
    row = block_format("mxfp4_dualscale")
    group = torch.randn(6, 96) * torch.exp2(torch.arange(96) // 32 * 2.0) * size
    importance = torch.rand(96) ** 2
    chosen = best_outer(group, importance, row).double().numpy()
    exact, counts = group.double().numpy(), importance.double().numpy().reshape(3, 32)
    top = group.abs().amax(-1) / 6

    def error(outer: np.ndarray) -> np.ndarray:
        inner = (exact / outer[:, None]).reshape(6, 3, 32)
        byte = oracle.exponent(abs(inner).max(-1)) + 127 - 2
        return sum(
            np.min([error_under(inner[:, b], counts[b], byte[:, b] + step, "mxfp4") for step in AROUND], axis=0)
            for b in range(3)
        ) * outer**2  # fmt: skip

    every = np.stack([error((top * 2.0 ** (-s / PER_OCTAVE)).double().numpy()) for s in range(PER_OCTAVE)])
    assert (error(chosen) <= every.min(0) * (1 + 1e-5)).all()
    assert (every.min(0) < every[0]).any()  # the search is for something


def test_groups_that_no_scale_holds_are_zeros():
    group = torch.stack([torch.zeros(64), torch.full((64,), 1e-39), torch.ones(64)])
    assert (best_outer(group, torch.ones(64), block_format("mxfp4_dualscale")) > 0).tolist() == [False, False, True]


# -- whole weights -------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("size", (1.0, 1e-30, 1e30))
def test_a_search_is_no_worse_than_the_rule(fmt, k, size):
    weight = torch.randn(12, k) * torch.exp2(torch.randn(12, k))
    weight[3], weight[5, :32], weight[7] = 0, 0, weight[7] * 1e-3
    weight = (weight * size).bfloat16()
    importance = torch.rand(k) ** 3
    packed = search(weight.float(), importance, fmt)
    ours, rule = (weighted(weight, p, importance) for p in (packed, mxdit.encode(weight, fmt)))
    assert (ours <= rule * (1 + 1e-5)).all() and ours[3] == 0 < ours[0]
    assert ours.sum() < rule.sum() or fmt == "mxfp8"  # eight bits have little to search for


@formats
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("size", (1.0, 1e-38, 1e30))
def test_a_layer_takes_what_a_search_gives(fmt, k, size):
    weight = torch.randn(4, k) * size
    packed = search(weight, torch.rand(k), fmt)
    layer = mxdit.MXLinear(k, 4, False, method=fmt)
    outer = {} if packed.outer is None else {"weight_dual_scale": packed.outer[..., None]}
    layer.load({"weight": packed.codes, "weight_scale": packed.scale, **outer})
    assert bool(torch.isfinite(mxdit.decode(layer.packed())).all())


# -- outer scales afterwards ---------------------------------------------------------------------------------------------


def quadratic(weight: torch.Tensor, packed: mxdit.Packed, hessian: torch.Tensor) -> torch.Tensor:
    """(w - q) H (w - q)^T of each row, float64."""
    d = weight.double() - mxdit.decode(packed).double()
    return ((d @ hessian.double()) * d).sum(-1)


@pytest.mark.parametrize("k", (96, 512, 1056, 1600))
def test_refitted_scales_are_the_least_squares_solution(k):
    weight, hessian = torch.randn(8, k), correlated(k)
    packed = search(weight, hessian.diagonal(), "mxfp4_dualscale")
    got = refit(packed, weight, hessian)
    assert torch.equal(got.codes, packed.codes) and torch.equal(got.scale, packed.scale)
    root = np.linalg.cholesky(hessian.double().numpy()).T  # d H d^T = |root d|^2
    inner = oracle.values(oracle.unpack(packed.codes.numpy()), packed.scale.numpy(), "mxfp4_dualscale")
    edges = [*range(0, k, 512), k]
    for i in range(8):
        parts = np.zeros((k, len(edges) - 1))
        for g, (start, stop) in enumerate(itertools.pairwise(edges)):
            parts[start:stop, g] = inner[i, start:stop]
        want = np.linalg.lstsq(root @ parts, root @ weight[i].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(got.outer[i].numpy(), want, rtol=1e-4)
    assert bool((quadratic(weight, got, hessian) < quadratic(weight, packed, hessian)).all())


def test_refit_never_makes_a_row_worse():
    weight, hessian = torch.randn(40, 1056), correlated(1056, rows=700)  # singular
    packed = search(weight, hessian.diagonal(), "mxfp4_dualscale")
    best = refit(packed, weight, hessian)
    again = refit(best, weight, hessian)
    before, once, twice = (quadratic(weight, p, hessian) for p in (packed, best, again))
    assert bool((once <= before).all()) and bool((twice <= once).all())
    flipped = refit(packed, -weight, hessian)  # no positive scale helps
    assert torch.equal(flipped.outer, packed.outer)


def test_groups_that_no_input_connects_are_refitted_as_if_alone():
    """However little one of them matters beside the other."""
    weight, importance = torch.randn(6, 1024), torch.ones(1024)
    importance[512:] = 1e-9
    packed = search(weight, importance, "mxfp4_dualscale")
    got = refit(packed, weight, importance.diag()).outer
    for group, piece in enumerate((slice(0, 512), slice(512, 1024))):
        w, own = weight[:, piece], importance[piece]
        alone = refit(search(w, own, "mxfp4_dualscale"), w, own.diag())
        assert torch.allclose(got[:, group], alone.outer[:, 0], rtol=1e-5)
    assert not torch.equal(got, packed.outer)


def test_groups_of_zeros_stay_zeros_when_the_others_are_refitted():
    weight, hessian = torch.randn(6, 1536), correlated(1536)
    weight[1, 512:1024], weight[2], weight[4, 1024:] = 0, 0, 0
    packed = search(weight, hessian.diagonal(), "mxfp4_dualscale")
    got = refit(packed, weight, hessian)
    assert torch.equal(got.outer == 0, packed.outer == 0) and int((packed.outer == 0).sum()) == 5
    assert not bool(mxdit.decode(got)[weight == 0].any())
    changed = (got.outer != packed.outer).all(-1)
    assert changed.tolist() == [True, False, False, True, False, True]
    assert bool((got.outer[[1, 4]] != packed.outer[[1, 4]]).any(-1).all())
