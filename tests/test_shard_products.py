"""Products of shards: every rank's result is the definition's bit for bit (`ranks`), and with them their sum."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import mxdit
from mxdit.bench.shapes import A14B
from ranks import DEGREES, LINEARS, OUTPUTS, SPLITS, WIDTHS, case, expected

pytestmark = pytest.mark.slow


def product(
    x: torch.Tensor, parts: dict[str, torch.Tensor], bias: torch.Tensor | None, method: str, activation: str
) -> torch.Tensor:
    """What a layer that holds the tensors computes."""
    n, k = parts["weight"].shape[0], x.shape[-1]
    smooth = "mul_scale" in parts
    layer = mxdit.MXLinear(k, n, False, method=method, activation=activation, smooth=smooth, device="meta")
    layer.load(parts)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer(x)


def result(
    x: torch.Tensor,
    parts: dict[str, torch.Tensor],
    bias: torch.Tensor,
    method: str,
    activation: str,
    rank: int,
    degree: int,
) -> torch.Tensor:
    """A row-parallel rank's, as a caller of `mxdit.shard` computes it."""
    held, shard = mxdit.shard(parts, method, "row", rank, degree)
    x = F.pad(x[:, shard.start : shard.stop], (shard.phase, 0))
    return product(x, held, bias if rank == 0 else None, method, activation)


@pytest.mark.parametrize(("method", "activation", "smooth"), LINEARS, ids=str)
@pytest.mark.parametrize("k", WIDTHS)
def test_every_rank_computes_what_is_defined(path, method, activation, smooth, k):
    x, parts, bias = case(method, activation, smooth, k)
    for degree in (degree for width, degree in SPLITS if width == k):
        for rank, defined_result in enumerate(expected(method, activation, smooth, k, degree)):
            got = result(x, parts, bias, method, activation, rank, degree)
            assert torch.equal(got, defined_result), (degree, rank)
    assert torch.equal(expected(method, activation, smooth, k, 1)[0], product(x, parts, bias, method, activation))


@pytest.mark.parametrize(("method", "activation", "smooth"), LINEARS, ids=str)
@pytest.mark.parametrize(("k", "degree"), [(3072, 2), (14336, 4), (1536, 1)])
def test_one_device_gives_the_same_where_no_group_is_cut_and_one_rank_has_all(
    path, method, activation, smooth, k, degree
):
    """The other ranks add zeros then."""
    x, parts, _ = case(method, activation, smooth, k)
    width = k // degree
    for rank in range(degree):
        alone = torch.zeros_like(x)
        alone[:, rank * width : (rank + 1) * width] = x[:, rank * width : (rank + 1) * width]
        partial = [result(alone, parts, torch.zeros(OUTPUTS), method, activation, r, degree) for r in range(degree)]
        assert torch.equal(torch.stack(partial).sum(0), product(alone, parts, torch.zeros(OUTPUTS), method, activation))


@pytest.mark.parametrize(("method", "activation", "smooth"), LINEARS, ids=str)
def test_columns_are_columns_of_the_result(path, method, activation, smooth):
    x, parts, bias = case(method, activation, smooth, 1536, 40)
    held = [mxdit.shard(parts, method, "column", rank, 8) for rank in range(8)]
    columns = [product(x, shares, bias[shard.start : shard.stop], method, activation) for shares, shard in held]
    assert torch.equal(torch.cat(columns, -1), product(x, parts, bias, method, activation))
    assert {shard.phase for _, shard in held} == {0}


# Every split with one kind of linear, and every kind with some splits; MXDIT_EXHAUSTIVE=1 takes all of both, in 16 minutes.
INTERPRETED = [
    (*linear, k, degree)
    for i, (k, degree) in enumerate(SPLITS)
    for j, linear in enumerate(LINEARS)
    if os.environ.get("MXDIT_EXHAUSTIVE") or (i * 5 + j) % len(LINEARS) == 0
]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, where a device says nothing
@pytest.mark.parametrize(("method", "activation", "smooth", "k", "degree"), INTERPRETED, ids=str)
def test_triton_kernels_compute_what_is_defined(monkeypatch, method, activation, smooth, k, degree):
    pytest.importorskip("triton", minversion="3.9")
    from interpreted import interpreted
    from mxdit.backends import triton_matmul

    monkeypatch.setitem(triton_matmul.FLOATS, "step", 512)  # the same sums in fewer steps
    x, parts, bias = case(method, activation, smooth, k)
    for rank, defined_result in enumerate(expected(method, activation, smooth, k, degree)):
        with interpreted():
            got = result(x, parts, bias, method, activation, rank, degree)
        assert torch.equal(got, defined_result), rank


def test_the_operators_of_an_npu_take_shards(npu):
    x, parts, bias = case("mxfp4_dualscale", "mxfp4", True, 1536)
    for rank, defined_result in enumerate(expected("mxfp4_dualscale", "mxfp4", True, 1536, 4)):
        on_device = {name: part.to("npu") for name, part in parts.items()}
        got = result(x.to("npu"), on_device, bias.to("npu"), "mxfp4_dualscale", "mxfp4", rank, 4)
        assert torch.equal(got.cpu(), defined_result), rank


@pytest.mark.parametrize("outliers", (0, 27))
def test_ranks_are_as_accurate_as_one_device(outliers):
    k = A14B.ffn
    x, weight = torch.randn(64, k), (torch.randn(32, k) * 0.02).bfloat16()
    x[:, torch.randperm(k)[:outliers]] *= 30
    x = x.bfloat16()
    parts, exact = mxdit.quantize_weight(weight, "mxfp4_dualscale"), x.double() @ weight.double().T
    errors = []
    for degree in DEGREES:
        results = [
            result(x, parts, torch.zeros(32).bfloat16(), "mxfp4_dualscale", "mxfp4", r, degree) for r in range(degree)
        ]
        total = results[0]
        for partial in results[1:]:
            total = total + partial  # in bf16, as all-reduces add
        errors.append(float((total.double() - exact).norm() / exact.norm()))
    assert 0.15 < errors[0] < 0.18 and max(errors) < 1.005 * errors[0], errors
