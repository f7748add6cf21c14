"""The engine's own ways to use two processes, beside tensor parallelism, in BF16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import Record
from test_baseline import assert_same_video, by_name

# Keyword arguments of `Omni`.
WAYS: dict[str, dict[str, Any]] = {
    "cfg": {"cfg_parallel_size": 2},  # one rank for the prompt, one for the negative prompt
    "ulysses": {"ulysses_degree": 2},  # each rank has half of the tokens, and of the heads in attention
    "hsdp": {
        "use_hsdp": True,
        "hsdp_shard_size": 2,
    },  # each rank has half of each weight, and gathers it block by block
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, directories, ran) -> tuple[str, Record]:
    return request.param, ran(directories["t2v"], **WAYS[request.param])


def test_there_are_two_workers(way):
    assert len(way[1].ranks) == 2


def test_the_video_is_that_of_one_rank(way, directories, ran):
    assert_same_video(ran(directories["t2v"], tensor_parallel_size=1), way[1].video())


def test_what_each_rank_holds_and_works_on(way, directories, ran):
    name, record = way
    whole = by_name(ran(directories["t2v"], tensor_parallel_size=1))
    for path, layers in by_name(record).items():
        weight, x = whole[path][0].tensors["weight"], whole[path][0].tensors["input"]
        held = [layer.tensors["weight"] for layer in layers]
        if name == "hsdp":
            assert torch.equal(torch.cat(held), weight), path
        else:
            assert all(torch.equal(part, weight) for part in held), path
        if name == "ulysses" and "attn2.to_k" not in path and "attn2.to_v" not in path:
            assert sum(layer.tensors["input"].shape[1] for layer in layers) == x.shape[1], path
        elif name == "cfg" and "attn2.to_k" in path:  # of the text
            first, second = (layer.tensors["input"] for layer in layers)
            assert torch.equal(first, x) and not torch.equal(second, x), path
        else:
            assert all(layer.tensors["input"].shape == x.shape for layer in layers), path
