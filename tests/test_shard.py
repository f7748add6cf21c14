"""Shards of a quantized linear are slices of the whole one's tensors; what cannot be split is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mxdit
from mxdit.bench.shapes import PUBLISHED, Wan
from mxdit.errors import FormatError
from mxdit.numerics.formats import FORMATS, TensorInfo
from ranks import OUTPUTS, SPLITS, whole


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
        assert all(part.is_contiguous() for part in held.values())
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
    with pytest.raises(
        FormatError, match=f"^{LAYER}, weight: no codes of a linear to split; got .*{parts['weight'].numel()}"
    ):
        mxdit.shard({**parts, "weight": parts["weight"].flatten()}, "mxfp4_dualscale", "row", 0, 2, where=LAYER)
    with pytest.raises(FormatError, match=r"not the tensors of one mxfp4_dualscale linear; got .*bias"):
        mxdit.shard({**parts, "bias": torch.zeros(OUTPUTS)}, "mxfp4_dualscale", "row", 0, 2)
