"""`mxdit.step_policy` in real pipelines: what every layer has at every step, whatever ends the call, and what is refused."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import nn

import mxdit
import tiny
from mxdit import MXConfig, MXLinear, StepPolicy
from mxdit.errors import ConfigError, ModelError
from mxdit.models import spec_of, uncompiled

pytestmark = pytest.mark.slow

STEPS = 4  # of tiny.generate, of which each expert makes two
POLICY = {"mxfp8": [0, 3], "bf16": [2], "of": STEPS}
AT = ["mxfp8", None, "bf16", "mxfp8"]
Seen = list[tuple[int, str, dict[str, str]]]


def quantized(method: str = "mxfp4", **keys: Any) -> Any:
    """A tiny cascade, both experts quantized."""
    pipe = tiny.pipeline()
    for model in (pipe.transformer, pipe.transformer_2):
        mxdit.quantize_(model, MXConfig(method, num_bf16_fallback_layers=0, **keys))
    return pipe


@pytest.fixture(scope="module")
def shared() -> Any:
    return quantized()


@pytest.fixture
def pipe(shared: Any) -> Iterator[Any]:
    """One for all tests, which leave it as it was."""
    before, scheduler = activations(shared), shared.scheduler
    yield shared
    assert activations(shared) == before
    shared.scheduler = scheduler
    mxdit.step_policy(shared, {})


def experts(pipe: Any) -> dict[str, nn.Module]:
    return {
        name: getattr(pipe, name) for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None
    }


def layers(model: nn.Module) -> dict[str, MXLinear]:
    return {path: m for path, m in uncompiled(model).named_modules() if isinstance(m, MXLinear)}


def activations(pipe: Any) -> dict[str, dict[str, str]]:
    return {name: {path: layer.activation for path, layer in layers(m).items()} for name, m in experts(pipe).items()}


def watched(pipe: Any, run: Callable[[Callable[[], None]], Any]) -> Seen:
    """(step, expert, path -> activation) of each call of an expert, seen from inside its first block. `run` is given what it
    has to call after each step: the count is the test's own."""
    seen: Seen = []
    done: list[None] = []

    def hook(name: str, model: nn.Module) -> Any:
        return lambda *_: seen.append((len(done), name, {p: layer.activation for p, layer in layers(model).items()}))

    hooks = []
    for name, model in experts(pipe).items():
        block = uncompiled(model).get_submodule(spec_of(uncompiled(model)).blocks[0])[0]  # pyright: ignore[reportIndexIssue]
        hooks.append(block.register_forward_pre_hook(hook(name, model)))
    try:
        run(lambda: done.append(None))
    finally:
        for one in hooks:
            one.remove()
    return seen


def generate(pipe: Any, steps: int = STEPS, after: Callable[[int], Any] = lambda step: None, **more: Any) -> np.ndarray:
    """`tiny.generate`'s clip, with something done after each step."""

    def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        after(step)
        return tensors

    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a red seven", height=16, width=16, num_frames=5, num_inference_steps=steps, guidance_scale=4.0,
        max_sequence_length=8, output_type="np", generator=torch.Generator().manual_seed(0),
        callback_on_step_end=on_step_end, **more,
    ).frames  # fmt: skip


def steps_of(pipe: Any, **options: Any) -> Seen:
    return watched(pipe, lambda tell: generate(pipe, after=lambda _: tell(), **options))


def by_hand(pipe: Any, at: Sequence[str | None]) -> np.ndarray:
    """The clip of a loop that sets the layers itself."""
    own = [(layer, layer.activation) for model in experts(pipe).values() for layer in layers(model).values()]

    def prepare(step: int) -> None:
        for layer, activation in own:
            layer.activation = (at[step] if step < len(at) else None) or activation

    prepare(0)
    return generate(pipe, len(at), lambda step: prepare(step + 1))


# -- what happens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale"])
def test_every_step_has_its_activations_and_the_video_is_that_of_setting_them_by_hand(method):
    """The order of precedence: what is not quantized, then the step, then the layer, then the default."""
    raised = ["blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2"]
    pipe = quantized(method, ignored_layers=("blocks.0.attn1.*",), w4a8_fallback_layers=tuple(raised))
    own, at = activations(pipe), ["mxfp8", None, "bf16", "mxfp4"]
    assert all(own[name][path] == "mxfp8" for name in own for path in raised)
    plain, expected = generate(pipe), by_hand(pipe, at)
    assert activations(pipe) == own and not np.array_equal(plain, expected)

    policy = mxdit.step_policy(pipe, {"mxfp8": [0], "bf16": [2], "mxfp4": [3], "of": STEPS})
    seen = steps_of(pipe)
    assert [(step, name) for step, name, _ in seen] == [
        (step, name) for step, name in enumerate(["transformer"] * 2 + ["transformer_2"] * 2) for _ in range(2)
    ], "guidance calls an expert twice a step, and the steps go on from one expert to the other"
    for step, name, found in seen:
        assert found == (dict.fromkeys(own[name], at[step]) if at[step] else own[name])
    for model in experts(pipe).values():
        assert type(model.get_submodule("blocks.0.attn1.to_q")) is nn.Linear
    assert np.array_equal(generate(pipe), expected), "also in the next call"
    assert activations(pipe) == own
    policy.remove()
    assert np.array_equal(generate(pipe), plain)


def test_activations_over_mxfp8_weights_are_mxfp8_or_floats(shared):
    pipe = quantized("mxfp8")
    plain = generate(pipe)
    mxdit.step_policy(pipe, {"mxfp8": [1]})
    assert np.array_equal(generate(pipe), plain)
    with mxdit.step_policy(pipe, {"bf16": [1]}):
        assert not np.array_equal(generate(pipe), plain)
    with pytest.raises(ConfigError, match=r"'mxfp4' do not go with weights in 'mxfp8'; expected .*'mxfp8' or 'bf16'"):
        mxdit.step_policy(pipe, {"mxfp4": [1]})


def test_a_with_block_ends_it_and_removing_twice_is_harmless(pipe):
    plain = generate(pipe)
    with mxdit.step_policy(pipe, POLICY) as applied:
        assert applied.policies == dict.fromkeys(experts(pipe), StepPolicy.from_dict(POLICY))
        assert not np.array_equal(generate(pipe), plain)
    applied.remove()
    assert np.array_equal(generate(pipe), plain)


def test_a_later_policy_takes_the_place_of_an_earlier_one(pipe):
    first = mxdit.step_policy(pipe, {"bf16": [0, 1, 2, 3]})
    second = mxdit.step_policy(pipe, {"mxfp8": [1]})
    assert [next(iter(found.values())) for _, _, found in steps_of(pipe)] == ["mxfp4"] * 2 + ["mxfp8"] * 2 + [
        "mxfp4"
    ] * 4
    first.remove()
    assert "mxfp8" in [next(iter(found.values())) for _, _, found in steps_of(pipe)]
    second.remove()


def test_each_expert_may_have_its_own(pipe):
    with mxdit.step_policy(pipe, {"transformer_2": {"bf16": [0, 1, 3]}}) as applied:
        assert list(applied.policies) == ["transformer_2"]
        seen = steps_of(pipe)
    assert [next(iter(found.values())) for _, _, found in seen] == ["mxfp4"] * 6 + [
        "bf16"
    ] * 2  # 0 and 1 are the first one's
    with mxdit.step_policy(pipe, {"transformer": {"bf16": [0]}, "mxfp8": [0, 3], "of": 4}):
        seen = steps_of(pipe)
    assert [next(iter(found.values())) for _, _, found in seen] == ["bf16"] * 2 + ["mxfp4"] * 4 + ["mxfp8"] * 2


def test_what_is_set_between_calls_is_what_the_layers_have_at_other_steps():
    pipe = quantized()
    mxdit.step_policy(pipe, {"bf16": [0]})
    generate(pipe)
    mxdit.set_activation(pipe.transformer, "mxfp8")
    found = [next(iter(found.values())) for _, name, found in steps_of(pipe) if name == "transformer"]
    assert found == ["bf16"] * 2 + ["mxfp8"] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["in a block", "after a step"])
def test_a_call_that_raises_leaves_the_layers_as_they_were(pipe, error, where):
    plain, own = generate(pipe), activations(pipe)
    with mxdit.step_policy(pipe, POLICY):
        whole = generate(pipe)

        def fail(*_: Any) -> None:
            if pipe.scheduler.step_index == 3:  # of the second expert, which begins at another activation
                raise error

        if where == "in a block":
            hook = pipe.transformer_2.blocks[1].register_forward_pre_hook(fail)
            with pytest.raises(error):
                generate(pipe)
            hook.remove()
        else:
            with pytest.raises(error):
                generate(pipe, after=fail)
        if error is RuntimeError:  # torch calls no hook after Ctrl-C: the next call, or the end, puts it right
            assert activations(pipe) == own
        assert np.array_equal(generate(pipe), whole)
    assert activations(pipe) == own and np.array_equal(generate(pipe), plain)


def test_ctrl_c_and_then_the_end(pipe):
    own = activations(pipe)
    with pytest.raises(KeyboardInterrupt), mxdit.step_policy(pipe, {"bf16": [0, 1, 2, 3]}):
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(_interrupt)
        try:
            generate(pipe)
        finally:
            hook.remove()
    assert activations(pipe) == own


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_pipeline(pipe):
    with mxdit.step_policy(pipe, POLICY):
        whole = generate(pipe)

        def interrupt(step: int) -> None:
            pipe._interrupt = step == 1  # as diffusers documents it

        seen = watched(pipe, lambda tell: generate(pipe, after=lambda step: (interrupt(step), tell())))
        assert [step for step, _, _ in seen] == [0, 0, 1, 1]
        assert np.array_equal(generate(pipe), whole), "the next call begins at step 0"


# -- other loops ---------------------------------------------------------------------------------------------------------


def test_both_halves_of_a_second_order_step_are_one_step(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with mxdit.step_policy(pipe, {"mxfp8": [0], "bf16": [2], "of": 3}):
        seen = steps_of(pipe, steps=3)
    assert [(call, next(iter(found.values()))) for call, _, found in seen[::2]] == [
        (0, "mxfp8"), (1, "mxfp8"), (2, "mxfp4"), (3, "mxfp4"), (4, "bf16"),
    ]  # fmt: skip


@pytest.mark.parametrize("order", [1, 2])
def test_a_loop_that_begins_in_the_middle_of_the_schedule_counts_from_its_own_first_step(shared, order):
    pipe = WanVideoToVideoPipeline(
        tokenizer=shared.tokenizer, text_encoder=shared.text_encoder, transformer=shared.transformer, vae=shared.vae,
        scheduler=shared.scheduler if order == 1 else FlowMatchHeunDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    video = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(5)]

    def run(tell: Callable[[], None]) -> None:
        pipe.set_progress_bar_config(disable=True)
        pipe(
            video=video, prompt="a red seven", height=16, width=16, num_inference_steps=6, strength=0.5,
            max_sequence_length=8, guidance_scale=1.0, output_type="latent",
            callback_on_step_end=lambda *args: (tell(), args[3])[1],
        )  # fmt: skip

    with mxdit.step_policy(pipe, {"mxfp8": [0], "bf16": [2], "of": 3}):
        seen = watched(pipe, run)
    found = [next(iter(found.values())) for _, _, found in seen]
    assert found == [a for a in ("mxfp8", "mxfp4", "bf16") for _ in range(order)][: len(found)] and found[-1] == "bf16"


# -- configs -------------------------------------------------------------------------------------------------------------


def test_a_config_states_it_and_one_call_applies_it(tmp_path, caplog):
    """Online, saved, loaded again; and what is said to someone who forgets the call."""
    caplog.set_level(logging.WARNING)
    source = tiny.save(tmp_path / "source")
    config = mxdit.pipeline_config("mxfp4", activation_steps=POLICY, transformer_2={"activation_steps": {"bf16": [3]}})
    pipe = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config)
    expected = by_hand(pipe, ["mxfp8", None, None, "bf16"])
    assert [r.getMessage().count("mxdit.step_policy(pipe)") for r in caplog.records if r.name.startswith("mxdit")] == [
        1,
        1,
    ]
    caplog.clear()
    pipe.save_pretrained(tmp_path / "packed")

    pipe = WanPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    applied = mxdit.step_policy(pipe)
    assert applied.policies == {
        "transformer": StepPolicy.from_dict(POLICY), "transformer_2": StepPolicy({"bf16": (3,)})
    }  # fmt: skip
    assert np.array_equal(generate(pipe), expected)
    applied.remove()
    plain = generate(pipe)
    assert not np.array_equal(plain, expected)

    asked = mxdit.pipeline_config("mxfp4", activation_steps={})
    for options in ({"quantization_config": asked}, {}):
        pipe = WanPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16, **options)
        if not options:
            mxdit.step_policy(pipe, {})
        assert np.array_equal(generate(pipe), plain)
    assert not [r for r in caplog.records if r.name.startswith("mxdit")]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, POLICY),
        ({"activation_steps": {"bf16": [1]}}, {"bf16": [1]}),
        ({"w4a8_fallback_steps": [2]}, {"mxfp8": [2]}),
        ({"w4a8_fallback_layers": ["blocks.0.ffn.*"]}, POLICY),
        ({"activation": "mxfp8"}, None),  # as it replaces the stored layers
        ({"activation": "mxfp8", "activation_steps": {"bf16": [1]}}, {"bf16": [1]}),
    ],
)
def test_what_a_load_asks_for_and_what_is_stored(tmp_path_factory, asked, found):
    stored = tmp_path_factory.getbasetemp() / "stored policy"
    if not stored.exists():
        model = tiny.transformer().bfloat16()
        mxdit.quantize_(model, MXConfig.from_dict({"quant_method": "mxfp4", "activation_steps": POLICY}))
        model.save_pretrained(stored)
    model = tiny.load(stored, MXConfig.from_dict({"quant_method": "mxfp4", **asked}))
    policy = model.config.quantization_config.activation_steps
    assert (policy and policy.to_dict()) == found


def test_a_model_says_it_once_when_nobody_tells_it_the_steps(caplog):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, MXConfig.from_dict({"quant_method": "mxfp4", "activation_steps": {"bf16": [0]}}))
    for _ in range(2):
        tiny.forward(model)
    (record,) = [r for r in caplog.records if r.name == "mxdit.quantize.steps"]
    assert "WanTransformer3DModel: its config states activation_steps" in record.getMessage()


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_another_number_of_steps_is_refused_before_a_step_is_made(pipe):
    with mxdit.step_policy(pipe, POLICY):
        with pytest.raises(ConfigError, match=r"another number of steps.*a request of 5 steps; expected 4"):
            generate(pipe, steps=5)
        assert pipe.scheduler.step_index is None
    with mxdit.step_policy(pipe, {"mxfp8": [4]}):
        with pytest.raises(ConfigError, match="got step 4, and a request of 4 steps"):
            generate(pipe)
        generate(pipe, steps=5)


def test_a_call_outside_the_pipeline_is_refused(pipe):
    fresh = tiny.pipeline()
    mxdit.quantize_(fresh.transformer, "mxfp4")
    with mxdit.step_policy(fresh, {"mxfp8": [0]}):
        for _ in range(2):
            with pytest.raises(ModelError, match="the pipeline is at no step of a call"):
                tiny.forward(fresh.transformer)
            generate(fresh)
    tiny.forward(fresh.transformer)


def test_another_pipeline_of_the_same_transformers_is_refused(pipe):
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with mxdit.step_policy(pipe, {"mxfp8": [0]}):
        generate(pipe)
        with pytest.raises(ModelError, match=r"at no step of a call.* Put it on the pipeline that you call"):
            generate(other)


def test_what_does_not_count_its_steps_is_refused(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(
        ModelError, match=r"cannot be known; got no DDIMScheduler.step_index and no DDIMScheduler.begin"
    ):
        mxdit.step_policy(pipe, POLICY)
    loop = SimpleNamespace(transformer=pipe.transformer, scheduler=None)
    with pytest.raises(ModelError, match=r"got no SimpleNamespace.num_timesteps and no NoneType.step_index"):
        mxdit.step_policy(loop, POLICY)


def test_a_scheduler_that_is_replaced_later(shared):
    pipe = copy.copy(shared)
    with mxdit.step_policy(pipe, POLICY):
        pipe.scheduler = DDIMScheduler()
        with pytest.raises(ModelError, match=r"no DDIMScheduler.step_index"):
            tiny.forward(pipe.transformer)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (None, ConfigError, "no policy is given, and the configs of the transformers state none"),
        ({"transformer_3": {"mxfp8": [0]}}, ConfigError, "unknown activation; got 'transformer_3'"),
        ({"mxfp5": [0]}, ConfigError, "unknown activation; got 'mxfp5'"),
        ([0, 1], ConfigError, r"no object of activations and steps; got \[0, 1\]"),
    ],
)
def test_what_is_no_policy(pipe, policy, error, message):
    with pytest.raises(error, match=message):
        mxdit.step_policy(pipe, policy)


def test_transformers_that_are_not_quantized(pipe):
    floats = tiny.pipeline()
    with pytest.raises(ModelError, match="no transformer of the pipeline has a quantized linear; got transformer: Wan"):
        mxdit.step_policy(floats, POLICY)
    mxdit.quantize_(floats.transformer_2, "mxfp4")
    with pytest.raises(
        ConfigError, match=r"no quantized transformer of this name; got 'transformer'; .*'?transformer_2"
    ):
        mxdit.step_policy(floats, {"transformer": POLICY})
    with mxdit.step_policy(floats, POLICY) as applied:
        assert list(applied.policies) == ["transformer_2"]
        assert [next(iter(f.values())) for _, name, f in steps_of(floats) if name == "transformer_2"] == [
            "bf16"
        ] * 2 + ["mxfp8"] * 2
    alone = tiny.pipeline()
    alone.register_modules(transformer_2=None)
    mxdit.quantize_(alone.transformer, "mxfp4")
    with pytest.raises(
        ConfigError, match="no quantized transformer of this name; got 'transformer_2'; expected transformer"
    ):
        mxdit.step_policy(alone, {"transformer_2": POLICY})


# -- compiled, and gone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["before", "after", "in place"])
def test_a_compiled_transformer_has_one_graph_for_each_activation(how):
    """Compiled whole, before the policy came or after it, and nothing more in a second run."""
    pipe, policy = tiny.pipeline(), {"mxfp8": [1], "bf16": [3]}
    for name in ("transformer", "transformer_2"):  # of one block: torch traces no less than the whole
        setattr(pipe, name, tiny.transformer(num_layers=1).bfloat16())
        mxdit.quantize_(getattr(pipe, name), "mxfp4")
    with mxdit.step_policy(pipe, policy):
        expected = generate(pipe)
    torch.compiler.reset()
    made, ran = list[set[str]](), list[set[str]]()

    def backend(graph: Any, _: Any) -> Any:
        linears = [node for node in graph.graph.nodes if node.target is torch.ops.mxdit.linear.default]
        schemes = {node.args[6] for node in linears}
        assert len(linears) == tiny.LINEARS
        made.append(schemes)
        return lambda *args: (ran.append(schemes), graph(*args))[1]

    if how == "after":
        mxdit.step_policy(pipe, policy)
    if how == "in place":
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    if how != "after":
        mxdit.step_policy(pipe, policy)
    for _ in range(2):
        assert np.array_equal(generate(pipe), expected)
        assert made == [{"w4a4"}, {"w4a8"}] and ran == [{"w4a4"}] * 2 + [{"w4a8"}] * 2
        ran.clear()
    torch.compiler.reset()


def test_a_pipeline_with_a_policy_can_be_freed():
    pipe = quantized()
    mxdit.step_policy(pipe, POLICY)
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None


def test_a_copy_of_a_model_that_states_a_policy_saves_and_loads(tmp_path, caplog):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, MXConfig.from_dict({"quant_method": "mxfp4", "activation_steps": POLICY}))
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path)
    tiny.forward(copied)
    assert not [r for r in caplog.records if r.name == "mxdit.quantize.steps"], "the model itself says it"
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert tiny.same(loaded, model) and loaded.config.quantization_config == model.config.quantization_config
