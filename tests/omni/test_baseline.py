"""The engine in BF16, without any of ours: what the other tests are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import engine
import tiny
from engine import Linear, Record
from hosts import in_diffusers

TASKS = [(task, tp) for task in tiny.TASKS for tp in (1, 2)]
PER_BLOCK = 8  # attn1: qkv in one, to_out; attn2: q, k, v, to_out; ffn: two


@pytest.fixture(scope="module", params=TASKS, ids=lambda param: f"{param[0]}-tp{param[1]}")
def bf16(request: pytest.FixtureRequest, directories, ran) -> tuple[str, int, Record]:
    task, tp = request.param
    return task, tp, ran(directories[task], task, tensor_parallel_size=tp)


def test_there_is_a_worker_for_each_rank(bf16):
    _, tp, record = bf16
    assert len(record.ranks) == tp


def test_every_linear_of_every_block_was_called_unquantized(bf16):
    _, _, record = bf16
    for rank in record.ranks:
        blocks = {name: layer for name, layer in rank.linears.items() if ".blocks." in name}
        assert len(blocks) == 2 * tiny.BLOCKS * PER_BLOCK
        for name, layer in blocks.items():
            assert layer.method == "UnquantizedLinearMethod", name
            assert {"input", "partial", "output"} <= layer.tensors.keys(), name


def test_the_video_is_of_the_size_that_was_asked_for_and_shows_something(bf16):
    video = bf16[2].video()
    assert video.shape == (5, 32, 32, 3)
    assert 0 <= video.min() < video.max() <= 1


def test_a_linear_gives_the_product_of_what_it_is_recorded_with(bf16):
    _, tp, record = bf16
    for name, layers in by_name(record).items():
        partials = []
        for layer in layers:
            x, weight, bias = (layer.tensors.get(key) for key in ("input", "weight", "bias"))
            assert x is not None and weight is not None
            first = layer is layers[0] or layer.layer != "RowParallelLinear"
            partial = linear(x, weight, bias if first else None)
            assert torch.equal(partial, layer.tensors["partial"]), name
            partials.append(partial)
        if layers[0].layer == "RowParallelLinear" and tp > 1:
            assert torch.equal(torch.stack(partials).sum(0), layers[0].tensors["output"]), name


@pytest.mark.parametrize("task", tiny.TASKS)
def test_ranks_hold_slices(directories, ran, task):
    whole = by_name(ran(directories[task], task, tensor_parallel_size=1))
    for name, layers in by_name(ran(directories[task], task, tensor_parallel_size=2)).items():
        assert torch.equal(joined(layers), whole[name][0].tensors["weight"]), name


def by_name(record: Record) -> dict[str, list[Linear]]:
    """Each linear of a block on all ranks."""
    names = [name for name in record.ranks[0].linears if ".blocks." in name]
    return {name: [rank.linears[name] for rank in record.ranks] for name in names}


def joined(layers: list[Linear]) -> Tensor:
    """The whole weight, from those of the ranks."""
    weights = [layer.tensors["weight"] for layer in layers]
    match layers[0].layer:
        case "RowParallelLinear":
            return torch.cat(weights, 1)
        case "ColumnParallelLinear":
            return torch.cat(weights)
        case "QKVParallelLinear":  # each rank has its part of q, of k, and of v
            parts = [weight.chunk(3) for weight in weights]
            return torch.cat([torch.cat(part) for part in zip(*parts, strict=True)])
        case other:
            raise AssertionError(f"no rule for {other}")


def test_two_ranks_make_the_video_of_one(directories, ran):
    """They add in another order, so it is nearly the same."""
    one, two = (ran(directories["t2v"], tensor_parallel_size=tp) for tp in (1, 2))
    assert_same_video(one, two.video())


@pytest.mark.parametrize("bundled", [False, True], ids=["tiny", "bundled"])
@pytest.mark.parametrize("task", tiny.TASKS)
def test_diffusers_makes_the_same_video(directories, ran, task, bundled):
    directory = engine.BUNDLED / task if bundled else directories[task]
    first = engine.IMAGE if task == "i2v" else None
    assert_same_video(ran(directory, task, tensor_parallel_size=1), in_diffusers(directory, first))


def assert_same_video(one: Record, video: np.ndarray) -> None:
    """Nearer by far than what another seed makes, which in I2V is not far: the first frame is given."""
    assert 5 * distance(one.video(), video) < distance(one.video(), one.video(engine.SEEDS[1]))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)))


def test_without_the_plugin_the_engine_refuses_mxfp4(directories, tmp_path):
    with pytest.raises(engine.EngineFailed, match=r"DiffusionMXFP4Config .* only supported on NPU"):
        engine.run(
            directories["t2v"], tmp_path, {"quantization_config": "mxfp4"}, environment={"VLLM_PLUGINS": engine.CPU}
        )
