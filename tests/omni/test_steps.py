"""Activation precision by denoising step, over single- and dual-scale weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm_omni.diffusion.forward_context import DenoiseProgressMixin, set_forward_context

import engine
import quantized
from layers import MODEL, building, made
from mxdit.config.steps import StepPolicy
from mxdit.errors import BackendError
from mxdit.integrations.vllm_omni import steps
from mxdit.integrations.vllm_omni.linear import MXLinearMethod
from quantized import EXPERTS, Definition

CONFIGS = {
    "transformer": {"quant_method": "mxfp4", "activation_steps": {"mxfp8": [0], "of": engine.STEPS}},
    # The second expert's first step is the request's third: steps run on over both.
    "transformer_2": {
        "quant_method": "mxfp4_dualscale",
        "num_bf16_fallback_layers": 0,
        "activation_steps": {"mxfp8": [0], "bf16": [2], "of": engine.STEPS},
    },
}
FIRST = {"transformer": "mxfp8", "transformer_2": "bf16"}


@pytest.fixture(scope="module")
def packed(directories, tmp_path_factory) -> Path:
    return quantized.write(directories["t2v"], tmp_path_factory.mktemp("steps") / "model", CONFIGS)


def test_a_step_has_its_activation(packed, ran):
    """What is recorded is each linear's first call, at step 0 and at step 2."""
    (rank,) = ran(packed).ranks
    for expert in EXPERTS:
        definition = Definition(packed / expert)
        layers = {
            n.removeprefix(f"{expert}."): layer
            for n, layer in rank.linears.items()
            if n.startswith(f"{expert}.blocks.")
        }
        differ = False
        for name, layer in layers.items():
            x, given = layer.tensors["input"], layer.tensors["partial"]
            assert torch.equal(definition.partial(name, layer.layer, 0, 1, x, FIRST[expert]), given), name
            differ |= not torch.equal(definition.partial(name, layer.layer, 0, 1, x), given)
        assert differ


def test_a_request_of_another_number_of_steps_is_refused(packed, tmp_path):
    policy = {"method": "mxfp4", "activation_steps": {"mxfp8": [0], "of": engine.STEPS + 1}}
    other = {"method": "mxfp4_dualscale", "activation_steps": policy["activation_steps"]}
    with pytest.raises(engine.EngineFailed, match="written for another number of steps"):
        engine.run(packed, tmp_path, {"quantization_config": {"transformer": policy, "transformer_2": other}})


def test_the_engines_own_key_wins_over_the_checkpoint(packed, ran):
    """`w4a8_fallback_steps` of a user replaces the policy of config.json, and knows no number of steps."""
    config = {"method": "mxfp4", "w4a8_fallback_steps": [1]}
    other = {"method": "mxfp4_dualscale", "w4a8_fallback_steps": [1]}
    (rank,) = ran(packed, quantization_config={"transformer": config, "transformer_2": other}).ranks
    for expert in EXPERTS:
        definition = Definition(packed / expert)
        name = "blocks.0.ffn.net_2"
        layer = rank.linears[f"{expert}.{name}"]
        given = definition.partial(name, layer.layer, 0, 1, layer.tensors["input"])
        assert torch.equal(given, layer.tensors["partial"])


@pytest.fixture
def pipeline(monkeypatch) -> DenoiseProgressMixin:
    """What publishes steps, in a process of no requests yet; two transformers have asked for it."""
    monkeypatch.setattr(steps, "_begun", 0)
    monkeypatch.setattr(DenoiseProgressMixin, "record_denoise_step", DenoiseProgressMixin.record_denoise_step)
    steps.count_steps()
    steps.count_steps()
    return DenoiseProgressMixin()


def said(pipeline: DenoiseProgressMixin, count: int, *given: object, **named: object) -> list[tuple[int, int] | None]:
    """What a layer is told at each step of a request."""
    pipeline.scheduler = SimpleNamespace(timesteps=[*range(count)])  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    with set_forward_context():
        for step in range(count):
            pipeline.record_denoise_step(step, 0.0, *given, **named)  # pyright: ignore[reportArgumentType]
            found.append(steps.current_step("layer"))
    return found


def test_the_first_request_is_the_warm_up_where_it_has_two_steps(pipeline):
    assert said(pipeline, 2) == [None, None]
    assert said(pipeline, 2) == [(0, 2), (1, 2)]
    assert said(pipeline, 3) == [(0, 3), (1, 3), (2, 3)]


def test_a_first_request_of_another_length_is_no_warm_up(pipeline):
    assert said(pipeline, 3) == [(0, 3), (1, 3), (2, 3)]
    assert said(pipeline, 2) == [(0, 2), (1, 2)]


def test_a_number_of_steps_that_the_pipeline_gives_stays(pipeline):
    assert said(pipeline, 3, total_steps=8)[0] == (0, 8)
    assert said(pipeline, 3, None, 0.5, 8)[0] == (0, 8)
    assert said(pipeline, 3, SimpleNamespace(timesteps=[*range(5)]))[0] == (0, 5)


def test_a_pipeline_that_does_not_say_its_step_is_refused(pipeline):
    with pytest.raises(BackendError, match=r"^layer: .* got step None of None"):
        steps.current_step("layer")
    with set_forward_context(denoise_step_idx=0), pytest.raises(BackendError, match="got step 0 of None"):
        steps.current_step("layer")
    with pytest.raises(BackendError, match=r"^layer: .* got step None of None"):
        steps.StepSwitch(StepPolicy({"bf16": (0,)})).asked("layer")


def test_a_step_counts_before_a_layer_and_a_layer_before_all(pipeline):
    names = [f"blocks.{index}.ffn.net_2" for index in range(3)]
    keys = {
        "ignored_layers": names[:1],
        "w4a8_fallback_layers": names[1:2],
        "activation": "mxfp4",
        "activation_steps": {"bf16": [0]},
    }
    with building(MODEL | {"num_layers": 3}):
        methods = [made(RowParallelLinear, 64, 32, name=name, method="mxfp4", keys=keys).quant_method for name in names]
    assert not isinstance(methods[0], MXLinearMethod)
    pipeline.scheduler = SimpleNamespace(timesteps=[*range(4)])  # pyright: ignore[reportAttributeAccessIssue]
    for step, activations in enumerate((["bf16", "bf16"], ["mxfp8", "mxfp4"])):
        with set_forward_context():
            pipeline.record_denoise_step(step, 0.0)
            assert [method.activation_now() for method in methods[1:]] == activations
