"""Shards of a quantized linear: slices of the whole one's tensors, whose products are what docs/numerics.md 5.5 defines.

The definition is written here once more, by the oracle and without `mxdit.shard`: a rank's channels are cut at the whole
weight's multiples of 512, and each piece is quantized by itself. Inputs are such that no order of a sum matters (asserted),
so every path of the CPU must give each rank's result bit for bit, and with them their sum.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mxdit
import oracle
from mxdit.bench.shapes import A14B, MINI, PUBLISHED, TI2V_5B, Wan
from mxdit.errors import FormatError
from mxdit.numerics.formats import FORMATS, SCHEMES, TensorInfo

WIDTHS = sorted({layer.k for model in (A14B, TI2V_5B, MINI) for layer in model.layers})
DEGREES = (1, 2, 4, 8)
SPLITS = [(k, degree) for k in WIDTHS for degree in DEGREES if k % (32 * degree) == 0]
LINEARS = [
    (method, scheme.activation, smooth)
    for method, row in FORMATS.items()
    for scheme in SCHEMES.values()
    if method in scheme.weights
    for smooth in ((False, True) if row.smooths else (False,))
]
ROWS, OUTPUTS = 17, 6


# -- the definition ------------------------------------------------------------------------------------------------------


def quantum(x: np.ndarray) -> float:
    """The largest power of two that every number of x is a multiple of."""
    significand, exponent = np.frexp(x[x != 0])
    whole = np.ldexp(significand, 53).astype(np.int64)
    return float(np.ldexp((whole & -whole).astype(float), exponent - 53).min())


def exact_product(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """a @ w.T of numbers whose sums fit 24 bits in any order."""
    assert (abs(a) @ abs(w).T).max() <= 2.0**24 * quantum(a) * quantum(w), "the inputs of this test spread too far"
    return a @ w.T


def activation_of(
    x: np.ndarray, factors: np.ndarray | None, method: str, activation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values without an outer scale, and the outer scale (rows, 1), of channels that lie in one group."""
    one = np.ones((len(x), 1))
    if activation == "mxfp4" and method == "mxfp4_dualscale":
        codes, outer, byte = oracle.encode_dual(x, "rint", oracle.BF16, factors)
        return oracle.values(codes, byte, "mxfp4"), outer
    if factors is not None:
        x = oracle.to_float(x * factors, oracle.BF16)
    if activation == "bf16":
        return x, one
    codes, byte = oracle.encode(x, activation, "uos" if activation == "mxfp4" else "ocp", "rint", oracle.BF16)
    return oracle.values(codes, byte, activation), one


def defined(
    x: torch.Tensor,
    parts: dict[str, torch.Tensor],
    bias: torch.Tensor,
    method: str,
    activation: str,
    start: int,
    stop: int,
) -> torch.Tensor:
    """(M, N) bf16 of the rank that holds channels [start, stop) of x and the whole weight's ``parts``; 0 has the bias."""
    values, codes = x.double().numpy(), parts["weight"].numpy()
    codes = codes if method == "mxfp8" else oracle.unpack(codes)
    weight = oracle.values(codes, parts["weight_scale"].numpy(), method)
    factors = parts["mul_scale"].double().numpy() if "mul_scale" in parts else None
    first = bias.double().numpy() if start == 0 else np.zeros(len(weight))
    if method != "mxfp4_dualscale":
        held, _ = activation_of(
            values[:, start:stop], None if factors is None else factors[start:stop], method, activation
        )
        total = oracle.to_float(exact_product(held, weight[:, start:stop]) + first, oracle.FP32)
        return torch.from_numpy(oracle.to_float(total, oracle.BF16)).bfloat16()
    outer = parts["weight_dual_scale"].squeeze(-1).double().numpy()
    acc = np.broadcast_to(first, (len(values), len(weight)))
    for group in range(start // 512, -(-stop // 512)):
        piece = slice(max(start, group * 512), min(stop, (group + 1) * 512))
        held, level_0 = activation_of(values[:, piece], None if factors is None else factors[piece], method, activation)
        p = exact_product(held, weight[:, piece])
        acc = np.vectorize(oracle.fma)(p, oracle.to_float(level_0 * outer[:, group], oracle.FP32), acc)
    return torch.from_numpy(oracle.to_float(acc, oracle.BF16)).bfloat16()


# -- inputs --------------------------------------------------------------------------------------------------------------


def whole(method: str, k: int, smooth: bool, activation: str, n: int = OUTPUTS) -> dict[str, torch.Tensor]:
    """The tensors of a linear, quantized whole."""
    weight = torch.randn(n, k) * 0.1
    factors = torch.exp2(torch.randint(-1, 2, (k,))) if activation != "mxfp4" else torch.rand(k) + 0.5
    if method == "mxfp8":
        weight = torch.randint(-4, 5, (n, k)).float()
    return mxdit.quantize_weight(weight.bfloat16(), method, mul_scale=factors if smooth else None)


def inputs(k: int, activation: str, rows: int = ROWS) -> torch.Tensor:
    """Gaussian numbers whose groups differ; small whole ones where more than four bits of them are multiplied."""
    if activation != "mxfp4":
        return torch.randint(-7, 8, (rows, k)).bfloat16()
    return (torch.randn(rows, k) * torch.exp2(torch.arange(k) // 96 % 5)).bfloat16()


@cache
def case(method: str, activation: str, smooth: bool, k: int, n: int = OUTPUTS, rows: int = ROWS):
    torch.manual_seed(k)
    return inputs(k, activation, rows), whole(method, k, smooth, activation, n), torch.arange(n) - n / 2


@cache
def expected(method: str, activation: str, smooth: bool, k: int, degree: int) -> list[torch.Tensor]:
    """What each rank's result is, by the definition."""
    x, parts, bias = case(method, activation, smooth, k)
    width = k // degree
    return [defined(x, parts, bias, method, activation, r * width, (r + 1) * width) for r in range(degree)]


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


# -- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "activation", "smooth"), LINEARS, ids=str)
@pytest.mark.parametrize("k", [pytest.param(k, marks=pytest.mark.slow if k > MINI.ffn else ()) for k in WIDTHS])
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, where a device says nothing
@pytest.mark.parametrize(
    ("method", "activation", "smooth", "k", "degree"),
    [(*linear, 1536, 4) for linear in LINEARS] + [("mxfp4_dualscale", "mxfp4", True, 13824, 2)],
    ids=str,
)
def test_triton_kernels_compute_what_is_defined(method, activation, smooth, k, degree):
    pytest.importorskip("triton", minversion="3.9")
    from interpreted import interpreted

    x, parts, bias = case(method, activation, smooth, k)
    for rank, defined_result in enumerate(expected(method, activation, smooth, k, degree)):
        with interpreted():
            got = result(x, parts, bias, method, activation, rank, degree)
        assert torch.equal(got, defined_result), rank


@pytest.mark.slow
def test_the_operators_of_an_npu_take_shards(npu):
    x, parts, bias = case("mxfp4_dualscale", "mxfp4", True, 1536)
    for rank, defined_result in enumerate(expected("mxfp4_dualscale", "mxfp4", True, 1536, 4)):
        on_device = {name: part.to("npu") for name, part in parts.items()}
        got = result(x.to("npu"), on_device, bias.to("npu"), "mxfp4_dualscale", "mxfp4", rank, 4)
        assert torch.equal(got.cpu(), defined_result), rank


# -- tensors -------------------------------------------------------------------------------------------------------------


def decoded(parts: dict[str, torch.Tensor], method: str) -> torch.Tensor:
    outer = parts.get("weight_dual_scale")
    return mxdit.decode(
        mxdit.Packed(parts["weight"], parts["weight_scale"], None if outer is None else outer.squeeze(-1), method)
    )


@pytest.mark.parametrize(("k", "degree"), SPLITS)
@pytest.mark.parametrize("method", FORMATS)
def test_row_parallel_tensors_are_slices_behind_zeros(method, k, degree):
    row = FORMATS[method]
    parts = whole(method, k, row.smooths, "mxfp4")
    width = k // degree
    for rank in range(degree):
        held, shard = mxdit.shard(parts, method, "row", rank, degree)
        start, phase = rank * width, rank * width % 512 if row.outer else 0
        assert (shard.start, shard.stop, shard.phase) == (start, start + width, phase)
        codes = slice(start // row.per_byte, (start + width) // row.per_byte)
        assert torch.equal(held["weight"][:, phase // row.per_byte :], parts["weight"][:, codes])
        blocks = slice(start // 32, (start + width) // 32)
        assert torch.equal(held["weight_scale"][:, phase // 32 :], parts["weight_scale"][:, blocks])
        if row.outer:
            groups = range(start // 512, (start + width - 1) // 512 + 1)
            assert torch.equal(held["weight_dual_scale"], parts["weight_dual_scale"][:, list(groups)])
        if "mul_scale" in parts:
            factors = torch.cat([torch.ones(phase), parts["mul_scale"][start : start + width]])
            assert torch.equal(held["mul_scale"], factors)
        if phase:
            assert not held["weight"][:, : phase // 2].any()
            behind = held["weight_scale"][:, phase // 32 :][:, :1]
            assert torch.equal(held["weight_scale"][:, : phase // 32], behind.expand(-1, phase // 32))
        assert {name: TensorInfo.of(part) for name, part in held.items()} == shard.record(smooth="mul_scale" in parts)
        assert torch.equal(decoded(held, method)[:, phase:], decoded(parts, method)[:, start : start + width])


@given(
    blocks=st.integers(1, 20),
    rows=st.integers(1, 3),
    degree=st.integers(1, 9),
    method=st.sampled_from(sorted(FORMATS)),
    parallel=st.sampled_from(["column", "row"]),
)
def test_shards_of_any_linear_make_it_up(blocks, rows, degree, method, parallel):
    """Each part alone, from tensors on any device, meta included; nothing is copied but behind a phase."""
    n, k = rows * degree, 32 * blocks * degree
    smooth = FORMATS[method].smooths
    parts = whole(method, k, smooth, "mxfp4", n)
    shards = [mxdit.Shard(method, n, k, parallel, rank, degree) for rank in range(degree)]
    pieces = []
    for shard in shards:
        held = {name: shard.part(name, part) for name, part in parts.items()}
        on_meta = {name: shard.part(name, part.to("meta")) for name, part in parts.items()}
        assert shard.record(smooth=smooth) == {name: TensorInfo.of(part) for name, part in held.items()}
        assert shard.record(smooth=smooth) == {name: TensorInfo.of(part) for name, part in on_meta.items()}
        for name, part in held.items():
            if not shard.phase:
                assert part.untyped_storage().data_ptr() == parts[name].untyped_storage().data_ptr()
        pieces.append(decoded(held, method)[:, shard.phase :])
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]
    assert torch.equal(torch.cat(pieces, 0 if parallel == "column" else 1), decoded(parts, method))


def test_a_weight_of_a_broken_last_block_is_its_own_only_shard():
    parts = whole("mxfp4_dualscale", 1100, True, "mxfp4")
    held, shard = mxdit.shard(parts, "mxfp4_dualscale", "row", 0, 1)
    assert all(torch.equal(held[name], part) for name, part in parts.items()) and shard.in_features == 1100


# -- figures of the documents --------------------------------------------------------------------------------------------


def zeros(model: Wan, degree: int, names: str) -> str:
    """What zeros in front cost, as docs/numerics.md has it: percent for the slowest rank of each layer (mean over ranks)."""

    def phases(k: int) -> list[int]:
        return [mxdit.Shard("mxfp4_dualscale", model.dim, k, "row", rank, degree).phase for rank in range(degree)]

    rows = model.tokens("720p")
    out, ffn = phases(model.dim), phases(model.ffn)
    if names == "all linears":
        added = [2 * max(out) + max(ffn), (2 * sum(out) + sum(ffn)) / degree]
        total = sum(m * layer.k * layer.n * layer.count for m, layer in model.gemms(rows)) / (rows * model.dim)
    else:
        found = ffn if names == "`ffn.2`" else out
        added, total = [max(found), sum(found) / degree], model.ffn if found is ffn else model.dim
    slowest, mean = (100 * a * degree / total for a in added)
    return f"{slowest:.1f} ({mean:.1f})"


def test_the_table_of_padded_work_is_what_shards_hold():
    text = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text()
    table = re.findall(r"^\| (A14B|TI2V-5B) (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(table) == 6
    for model, names, *cells in table:
        assert cells == [zeros(PUBLISHED[model], degree, names) for degree in (2, 4, 8)], (model, names)


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


# -- refusals ------------------------------------------------------------------------------------------------------------

LAYER = "blocks.3.ffn.net.2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("mxfp4", 6, 1536, "row", 0, 5),
            r"K = 1536 cannot .* got .* of 5; expected one of 1, 2, 3, 4, 6, 8, 12, 16, 24, 48\.",
        ),
        (("mxfp4", 6, 48, "row", 0, 2), r"K = 48 cannot be split .* expected 1\. Every rank needs whole blocks of 32"),
        (("mxfp8", 6, 1536, "column", 0, 4), r"N = 6 cannot be split .* expected one of 1, 2, 3, 6$"),
        (("mxfp4", 6, 1536, "row", 2, 2), r"no such rank; got rank 2 of 2; expected 0 to 1"),
        (("mxfp4", 6, 1536, "row", -1, 2), r"no such rank; got rank -1 of 2; expected 0 to 1"),
        (("mxfp4", 6, 1536, "row", 0, 0), r"no such rank; got rank 0 of 0; expected at least one rank"),
        (
            ("mxfp4", 6, 1536, "rows", 0, 2),
            r"a linear is not split so; got parallel='rows'; expected 'column' or 'row'",
        ),
        (("mxfp5", 6, 1536, "row", 0, 2), r"unknown format; got 'mxfp5'"),
        (("mxfp4", 6, 1535, "row", 0, 1), r"mxfp4 cannot hold a weight of this shape"),
    ],
)
def test_what_cannot_be_split_is_refused(args, message):
    with pytest.raises(FormatError, match=f"^{LAYER}: {message}"):
        mxdit.Shard(*args, where=LAYER)


def test_tensors_of_another_linear_are_refused():
    parts = whole("mxfp4_dualscale", 1024, True, "mxfp4")
    shard = mxdit.Shard("mxfp4_dualscale", OUTPUTS, 1024, "row", 1, 2, where=LAYER)
    for name, part in {
        "weight": parts["weight"][:, :256],  # cut already
        "weight_scale": parts["weight_scale"].float(),
        "weight_dual_scale": parts["weight_dual_scale"].squeeze(-1),
        "bias": torch.zeros(OUTPUTS),
    }.items():
        with pytest.raises(FormatError, match=f"^{LAYER}, {name}: not a tensor of the whole mxfp4_dualscale linear"):
            shard.part(name, part)
    for missing in ("weight", "weight_scale", "weight_dual_scale"):
        rest = {name: part for name, part in parts.items() if name != missing}
        with pytest.raises(FormatError, match=f"^{LAYER}.*: (no codes|not the tensors)"):
            mxdit.shard(rest, "mxfp4_dualscale", "row", 0, 2, where=LAYER)
    with pytest.raises(FormatError, match=r"not the tensors of one mxfp4_dualscale linear; got .*bias"):
        mxdit.shard({**parts, "bias": torch.zeros(OUTPUTS)}, "mxfp4_dualscale", "row", 0, 2)
