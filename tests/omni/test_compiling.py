"""Blocks that the engine compiles: linears and attention of ours do not break their graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm_omni.diffusion.forward_context import DenoiseProgressMixin, set_forward_context

import mxdit
from layers import building, made
from mxdit.config import ACTIVATIONS
from test_baseline import assert_same_video

NAMES = "blocks.0.ffn.net_2", "blocks.1.ffn.net_2"
K, N = 576, 64  # a rank of two begins inside a group


def row_parallel(method: str, keys: dict[str, Any], name: str = NAMES[0]) -> Any:
    """The second rank's half of a linear that two ranks share."""
    generator = torch.Generator().manual_seed(0)
    packed = {"is_checkpoint_serialized": True, "layout": "packed", "version": 1}
    with building(degree=2, rank=1):
        layer = made(RowParallelLinear, K, N, name=name, method=method, keys={**packed, **keys})
    factors = torch.linspace(0.5, 2, K) if method != "mxfp8" else None
    weight = torch.randn(N, K, generator=generator).bfloat16()
    for leaf, part in mxdit.quantize_weight(weight, method, mul_scale=factors).items():
        held = getattr(layer, leaf)
        held.weight_loader(held, part)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x)


def compiling() -> tuple[Any, list[torch.fx.GraphModule]]:
    """`apply`, compiled as one graph or not at all, and the graphs that come of it."""
    graphs = list[torch.fx.GraphModule]()

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    return torch.compile(apply, backend=keep, fullgraph=True), graphs


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("method", "activation"), [(m, a) for m, names in ACTIVATIONS.items() for a in names])
def test_a_linear_is_one_graph_with_the_same_bits(method, activation, dtype):
    layer = row_parallel(method, {"activation": activation})
    compiled, graphs = compiling()
    x = torch.randn(2, 3, K // 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        assert torch.equal(compiled(layer, x), apply(layer, x))
    assert len(graphs) == 1


def test_activations_by_step_are_a_graph_each_and_no_more(monkeypatch):
    """Not one for each step, nor for each block: two linears of other names share them."""
    monkeypatch.setattr(DenoiseProgressMixin, "record_denoise_step", DenoiseProgressMixin.record_denoise_step)
    keys = {"activation_steps": {"mxfp8": [0, 5], "bf16": [9]}}
    layers = [row_parallel("mxfp4", keys, name) for name in NAMES]
    compiled, graphs = compiling()
    x = torch.randn(2, K // 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = list[torch.Tensor]()
    with torch.no_grad(), set_forward_context():
        for step in range(12):
            DenoiseProgressMixin().record_denoise_step(step, 0.0, total_steps=12)
            given += [compiled(layer, x) for layer in layers]
            assert all(torch.equal(out, apply(layer, x)) for out, layer in zip(given[-2:], layers, strict=True))
    assert len(graphs) == 3
    first = given[0]
    assert torch.equal(first, given[2 * 5]) and not any(torch.equal(first, given[2 * step]) for step in (1, 9))


def test_blocks_are_one_graph_each(directories, ran):
    """Of the engine itself. It compiles one more where the tokens' strides are others, as in an expert's first block."""
    options = {"quantization_config": "mxfp4", "diffusion_attention_backend": "MXDIT"}
    record = ran(directories["t2v"], enforce_eager=False, **options)
    (rank,) = record.ranks
    assert rank.compiled["breaks"] == {}
    assert 1 <= rank.compiled["graphs"] <= 2
    assert_same_video(ran(directories["t2v"], **options), record.video())
