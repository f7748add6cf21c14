"""Attention of ours in real models of diffusers: by the names of backends, by a policy, in a session and in an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode

import mxdit
import tiny
from mxdit import AttentionPolicy, Session
from mxdit.errors import ConfigError, InputError, ModelError
from mxdit.evals.modes import choose
from mxdit.evals.probe import velocity_errors
from mxdit.generation.recording import Recorder
from mxdit.integrations.diffusers_attention import BACKENDS, attend, attention_layers

STEPS = 4
CALLS = 2 * tiny.BLOCKS  # of attention, in a forward: of the video itself, and of the text


class Attended(TorchDispatchMode):
    """The method of every call of our op; "torch" for torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.methods: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mxdit.attention.default:
            self.methods.append(args[-1])
        elif "scaled_dot_product" in str(func):
            self.methods.append("torch")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def active() -> Iterator[None]:
    """diffusers' own setter also sets what is active everywhere."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 9, tiny.TEXT_DIM),
        "return_dict": False,
    }


@torch.inference_mode()
def forward(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
    with Attended() as seen:
        out = model(**inputs)[0]
    return out, seen.methods


@pytest.mark.parametrize("method", BACKENDS)
def test_diffusers_own_functions_take_the_names(method, inputs):
    model = tiny.transformer()
    want, methods = forward(model, inputs)
    assert methods == ["torch"] * CALLS
    with attention_backend(BACKENDS[method]):
        got, methods = forward(model, inputs)
    assert methods == [method] * CALLS
    close = 1e-5 if method == "exact" else 2e-2
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    model.set_attention_backend(BACKENDS[method])
    again, methods = forward(model, inputs)
    assert methods == [method] * CALLS and torch.equal(again, got)
    model.reset_attention_backend()
    assert AttentionBackendName(BACKENDS[method]).value == BACKENDS[method]


def test_what_a_backend_does_not_do(inputs):
    model = tiny.transformer()
    model.set_attention_backend("mxdit")
    with pytest.raises(ModelError, match="no gradient"):
        model(**inputs)
    q = torch.randn(1, 3, 2, 8)
    called = _AttentionBackendRegistry._backends["mxdit"]
    more: Any
    for more, says in (
        ({"dropout_p": 0.5}, r"dropout_p=0\.5"),
        ({"return_lse": True}, "return_lse=True"),
        ({"_parallel_config": object()}, "parallel: True"),
    ):
        with pytest.raises(ModelError, match=says):
            called(q, q, q, **more)
    padding = torch.tensor([[True, True, False]])
    torch.testing.assert_close(called(q, q, q, padding), called(q, q[:, :2], q[:, :2]))
    torch.testing.assert_close(called(q, q, q, is_causal=True)[:, :1], q[:, :1])


@pytest.mark.slow
def test_a_policy_of_layers_and_steps():
    pipe = tiny.pipeline()
    forwards: list[list[str]] = []
    with Attended() as seen:
        for model in (pipe.transformer, pipe.transformer_2):
            model.register_forward_pre_hook(lambda *_: seen.methods.clear())
            model.register_forward_hook(lambda *_: forwards.append(list(seen.methods)))
        with mxdit.attention_policy(pipe, "exact;3=torch;blocks.0.attn2=torch;of=4") as applied:
            assert set(applied.policies) == {"transformer", "transformer_2"}
            tiny.generate(pipe)
        begun = len(forwards)
        tiny.generate(pipe)
    own = ["exact", "torch", "exact", "exact"]
    per_step = begun // STEPS  # with guidance a step has two calls
    assert forwards[: 3 * per_step] == [own] * (3 * per_step)
    assert forwards[3 * per_step : begun] == [["torch"] * CALLS] * per_step
    assert all(methods == ["torch"] * CALLS for methods in forwards[begun:])


def test_a_later_policy_takes_the_place_of_an_earlier_one(inputs):
    pipe = tiny.pipeline(dtype=torch.float32)
    mxdit.attention_policy(pipe, "exact")
    later = mxdit.attention_policy(pipe, {"transformer_2": "exact"})
    assert forward(pipe.transformer, inputs)[1] == ["torch"] * CALLS
    assert forward(pipe.transformer_2, inputs)[1] == ["exact"] * CALLS
    pipe.transformer_2.set_attention_backend("mxdit")  # what a user set is there again after each call
    with mxdit.attention_policy(pipe, "int8"):
        with pytest.raises(RuntimeError):
            pipe.transformer_2(**{**inputs, "hidden_states": torch.randn(1, 3, 2, 8, 8)})
        assert held(pipe.transformer_2) == {"mxdit"}
        interrupted(pipe.transformer_2, inputs)  # of which torch tells no hook
        assert forward(pipe.transformer_2, inputs)[1] == ["int8"] * CALLS
        assert held(pipe.transformer_2) == {"mxdit"}
        interrupted(pipe.transformer_2, inputs)
    assert held(pipe.transformer_2) == {"mxdit"}
    later.remove()


def held(model: Any) -> set[str]:
    """The backends that a model's attention layers have, by name."""
    return {str(layer.processor._attention_backend.value) for layer in attention_layers(model).values()}


def interrupted(model: Any, inputs: dict[str, Any]) -> None:
    """A forward that the keyboard ends."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[0].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        forward(model, inputs)
    hook.remove()


def test_of_a_compiled_model_too():
    pipe = tiny_single()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")  # not called here
    mxdit.attention_policy(pipe, "int8")
    mxdit.attention_policy(pipe, "torch")
    assert not pipe.transformer._forward_pre_hooks


def test_for_good():
    block = tiny.transformer().blocks[0]
    attend(block, AttentionPolicy.parse("int8;attn2=torch"))
    names = {path: layer.processor._attention_backend for path, layer in attention_layers(block).items()}
    assert names == {"attn1": AttentionBackendName("mxdit_int8"), "attn2": None}


def test_models_and_layers_that_there_are_not():
    pipe = tiny.pipeline()
    with pytest.raises(ConfigError, match="attn3"):
        mxdit.attention_policy(pipe, "exact;blocks.*.attn3=torch")
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    with pytest.raises(InputError, match="one processor, and two methods"):
        mxdit.attention_policy(pipe, "exact;blocks.0.*=torch")
    with pytest.raises(ConfigError, match="no such transformer"):
        mxdit.attention_policy(tiny_single(), {"transformer_2": "exact"})


class Masked(WanAttnProcessor):
    """As processors that have masks of FlexAttention's own kind in some of their calls."""

    def cached(self, *qkv: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(*qkv, backend="flex")  # pyright: ignore[reportArgumentType]


class Flex(WanAttnProcessor):
    _attention_backend = "flex"


class Direct(WanAttnProcessor):
    def __call__(self, attn: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Elsewhere:
    _attention_backend = None

    def __call__(self, attn: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


class Own(WanAttnProcessor):
    """Whose base's call is run by nobody."""

    def __call__(self, attn: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


class Static(WanAttnProcessor):
    @staticmethod
    def attended(x: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(x, x, x, backend="flex")


@dataclass(eq=False)
class Plain(WanAttnProcessor):
    """As diffusers' own, made and written otherwise."""

    called: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.called = """
at least once"""
        return super().__call__(*args, **kwargs)


Unseen = type("Unseen", (WanAttnProcessor,), {"__call__": eval("lambda *_: None")})


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (Masked, "Masked, which also takes backend='flex'"),
        (Flex, "Flex, which is made for the backend 'flex'"),
        (Direct, "Direct, which calls scaled_dot_product_attention"),
        (Elsewhere, "Elsewhere, which does not call dispatch_attention_fn"),
        (Own, "Own, which does not call dispatch_attention_fn"),
        (Static, "Static, which also takes backend='flex'"),
        (Unseen, "Unseen, which has no source to read"),
    ],
)
def test_layers_that_do_not_always_take_what_is_set(processor, why):
    pipe = tiny_single()
    for block in pipe.transformer.blocks:
        block.attn1.processor = processor()
    for policy in ("int8", "torch;2=int8", "int8;blocks.1.*=torch"):
        with pytest.raises(ModelError, match=rf"WanTransformer3DModel blocks\.0\.attn1: .*{why}") as caught:
            mxdit.attention_policy(pipe, policy)
        assert caught.value.field == "attention"
    with pytest.raises(ModelError, match=r"2 of its 4 layers to diffusers.*'int8;blocks.\*.attn1=torch'"):
        mxdit.attention_policy(pipe, "int8")
    with pytest.raises(
        ModelError, match=r"2 of its 4 layers to diffusers.*'exact;blocks.\*.attn1=torch;blocks.0.\*=int8'"
    ):
        mxdit.attention_policy(pipe, "exact;blocks.0.*=int8")
    with pytest.raises(ModelError, match="Leave the policy out"):
        mxdit.attention_policy(pipe, "torch;blocks.*.attn1=int8")
    for policy in ("int8;blocks.*.attn1=torch", "exact;blocks.*.attn1=torch;blocks.0.*=int8"):  # the hints
        assert mxdit.attention_policy(pipe, policy).policies.keys() == {"transformer"}


def test_a_processor_of_a_users_own(inputs):
    pipe = tiny_single()
    pipe.transformer.float()
    for block in pipe.transformer.blocks:
        block.attn1.processor = Plain()
    mxdit.attention_policy(pipe, "int8")
    assert forward(pipe.transformer, inputs)[1] == ["int8"] * CALLS


def test_a_model_without_any_such_layer():
    pipe = tiny_single()
    pipe.transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"attention SD3Transformer2DModel: .*without looking up a backend; got 'exact'"
    ):
        mxdit.attention_policy(pipe, "exact")


def tiny_single() -> Any:
    pipe = tiny.pipeline()
    pipe.transformer_2 = None
    return pipe


@pytest.mark.parametrize(
    "text", ["torch", "exact", "exact;0-2,5=torch", "exact;blocks.0.*=torch", "torch;1=exact;blocks.1.attn1=exact;of=4"]
)
def test_text_and_json_say_the_same(text):
    policy = AttentionPolicy.parse(text)
    assert str(policy) == text
    assert AttentionPolicy.of_value(policy.to_dict()) == policy == AttentionPolicy.of_value(text)
    assert bool(policy) == (text != "torch")
    if policy.of:
        with pytest.raises(ConfigError, match="another number of steps"):
            policy.method_at(0, policy.of + 1)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("flash", "unknown method"),
        ("exakt", "Did you mean 'exact'"),
        ("exact;0-1", "not steps or layers"),
        ("exact;0=flash", "unknown method"),
        ("exact;2-1=torch", "neither a step"),
        ("exact;0=torch;0=exact", "two methods"),
        ("exact;7=torch;of=4", "beyond the last"),
        ("exact;of=4;of=5;0=torch", "not steps or layers"),
        ({"methods": "exact"}, "'methods'"),
        ({"method": "exact", "steps": [1]}, "are objects"),
        (3, "not a policy"),
    ],
)
def test_policies_that_are_none(value, says):
    with pytest.raises(ConfigError, match=says):
        AttentionPolicy.of_value(value)


@pytest.mark.slow
def test_a_session(tmp_path):
    directory = tiny.save(tmp_path)
    fields = {"prompt": "a red seven", "size": (32, 32), "frames": 5, "steps": STEPS}
    plain = Session.open(directory, dtype=torch.float32)
    want = plain.run(plain.request(**fields))
    session = Session.open(directory, dtype=torch.float32, attention="exact;0=torch;of=4")
    with Attended() as seen:
        got = session.run(session.request(**fields))
    # Of what the transformers call; the VAE and the text encoder have torch's.
    assert seen.methods.count("exact") == 3 * 2 * CALLS
    assert abs(got.frames.astype(int) - want.frames.astype(int)).max() <= 1
    with pytest.raises(ConfigError, match="another number of steps"):
        session.request(**{**fields, "steps": 6})
    # One for each: of the four steps the second transformer has three, with one call each.
    own = Session.open(directory, dtype=torch.float32, attention={"transformer_2": "exact;3=torch", "method": "torch"})
    assert own.attention.keys() == {"transformer_2"}
    with Attended() as seen:
        own.run(own.request(**fields))
    assert seen.methods.count("exact") == 2 * CALLS


def test_what_a_session_can_tell_before_weights_are_read(tmp_path, monkeypatch):
    directory = tiny.save(tmp_path)
    monkeypatch.setattr("mxdit.generation.loading.load", None)
    session = Session.open(directory, attention={"transformer": "exact", "transformer_2": "exact;blocks.2.*=torch"})
    with pytest.raises(ConfigError, match=r"^attention layers 'blocks.2.\*': the pattern matches nothing") as caught:
        session.load()
    assert caught.value.field == "attention"
    single = tiny_single()
    single.register_modules(transformer_2=None)
    single.save_pretrained(tmp_path / "single")
    with pytest.raises(ConfigError, match="attention: no such transformer; got 'transformer_2'; expected transformer"):
        Session.open(tmp_path / "single", attention={"transformer_2": "exact"})


@pytest.mark.slow
def test_an_evaluation(tmp_path):
    modes = choose([], ['a={"attention": "exact"}', 'b={"quant_method": "mxfp4", "attention": "exact;0=torch"}'])
    assert [mode.attention for mode in modes] == [None, "exact", "exact;0=torch"]
    directory = tiny.save(tmp_path)
    session = Session.open(directory, dtype=torch.float32)
    recorder = Recorder(keep_calls=True)
    with recorder.listening(session.load()):
        request = session.request(prompt="a red seven", size=(32, 32), frames=5, steps=STEPS)
        session.run(request, on_latents=recorder.on_latents)
    guidance = {"transformer": 1.0, "transformer_2": 1.0}
    with Attended() as seen:
        same = velocity_errors(session.load(), recorder.calls, guidance)
        assert set(seen.methods) == {"torch"}
        near = velocity_errors(
            session.load(), recorder.calls, guidance, Session.open(directory, attention=modes[2].attention).attention
        )
    assert seen.methods.count("exact") == len(recorder.calls) * CALLS * 3 // 4
    assert [step["velocity_error"] for step in same["steps"]] == [0.0] * STEPS
    errors = [step["velocity_error"] for step in near["steps"]]
    assert errors[0] == 0.0 and all(0 < error < 1e-5 for error in errors[1:])


def test_compiled_blocks_have_it_in_their_graph(inputs):
    pipe = tiny_single()
    pipe.transformer.float()
    for block in pipe.transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch.inference_mode():
        want = pipe.transformer(**inputs)[0]
        with mxdit.attention_policy(pipe, "exact"):
            got = pipe.transformer(**inputs)[0]
    assert not torch.equal(got, want)  # another method, in a graph of its own
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
