"""fuse_ in real models of diffusers: near what they computed, left again, where it stays out, compiled, in a session."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mxdit
import tiny
from mxdit.backends import cuda
from mxdit.integrations import diffusers_attention, diffusers_fused

OPS = torch.ops.mxdit
OF_A_BLOCK = {OPS.rms_norm_.default: 4, OPS.gelu_.default: 1}  # of Wan: norms of two attentions, one FeedForward


class Ops(TorchDispatchMode):
    """How often each op of ours was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mxdit":
            self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def transformer(dtype: torch.dtype) -> Any:
    """As from_pretrained gives it: rotary embeddings in fp32 (a cast of the whole model casts these, too)."""
    model = tiny.transformer().to(dtype)
    model.rope = tiny.transformer().rope
    return model


def ops_of(model: Any) -> tuple[torch.Tensor, dict[Any, int]]:
    with Ops() as seen:
        out = tiny.forward(model)
    return out, seen.calls


def every(count: int) -> dict[Any, int]:
    return {op: count * calls for op, calls in OF_A_BLOCK.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_computes_the_same_and_can_be_left_again(dtype):
    model = transformer(dtype)
    want, classes, names = tiny.forward(model), [type(m) for m in model.modules()], list(model.state_dict())
    with mxdit.fuse_(model) as fused:
        got, calls = ops_of(model)
        assert calls == every(tiny.BLOCKS)
        assert list(model.state_dict()) == names
        assert {path for path in fused.paths if path.startswith("blocks.0.")} == {
            *(f"blocks.0.attn{n}{part}" for n in (1, 2) for part in ("", ".norm_q", ".norm_k")),
            "blocks.0.ffn.net.0",
        }
        assert mxdit.fuse_(model).paths == () and ops_of(model)[1] == calls
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert [type(m) for m in model.modules()] == classes and torch.equal(tiny.forward(model), want)


def test_a_quantized_model():
    model = transformer(torch.bfloat16)
    mxdit.quantize_(model, "mxfp4")
    want = tiny.forward(model)
    with mxdit.fuse_(model):
        got, calls = ops_of(model)
    assert calls.items() >= every(tiny.BLOCKS).items()
    assert (got - want).square().mean() < 0.05 * want.square().mean()
    assert torch.equal(tiny.forward(model), want)


def test_attention_of_ours_beside():
    model = tiny.transformer()
    want = tiny.forward(model)
    mxdit.fuse_(model)
    for layer in diffusers_attention.attention_layers(model).values():
        layer.processor._attention_backend = "mxdit"
    got, calls = ops_of(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert calls == every(tiny.BLOCKS) | {OPS.attention.default: 2 * tiny.BLOCKS}


def test_what_a_hook_holds_is_left_alone():
    model = tiny.transformer()
    mxdit.fuse_(model)
    want, held = tiny.forward(model), []
    linears = [model.blocks[0].attn1.to_q, model.blocks[0].ffn.net[0].proj]
    for linear in linears:
        linear.register_forward_hook(lambda _, args, out: held.append((args[0], out, out.clone())))
    normed = []
    model.blocks[1].attn1.norm_k.register_forward_hook(lambda *_: normed.append(1))
    got, calls = ops_of(model)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(held) == 2 and normed == [1]
    assert all(torch.equal(out, copy) for _, out, copy in held)
    assert calls[OPS.rms_norm_.default] == 4 * tiny.BLOCKS - 3 and calls[OPS.gelu_.default] == tiny.BLOCKS - 1


def test_training_computes_as_before():
    model, plain = tiny.transformer(), tiny.transformer()
    mxdit.fuse_(model)
    inputs = {
        "hidden_states": torch.randn(1, 16, 1, 4, 4),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.randn(1, 6, tiny.TEXT_DIM),
    }
    for each in (model, plain):
        with Ops() as seen:
            each(**inputs).sample.square().mean().backward()
        assert not seen.calls
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_under_autocast_it_computes_as_before():
    model = tiny.transformer()
    mxdit.fuse_(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops_of(model)[1]


def test_attention_of_an_image_too_stays_with_diffusers():
    model = tiny.transformer(image_dim=24, added_kv_proj_dim=64)
    call = {
        "hidden_states": torch.randn(1, 16, 1, 4, 4),
        "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.randn(1, 512, tiny.TEXT_DIM),
        "encoder_hidden_states_image": torch.randn(1, 5, 24),
        "return_dict": False,
    }
    with torch.no_grad():
        want = model(**call)[0]
        mxdit.fuse_(model)
        with Ops() as seen:
            torch.testing.assert_close(model(**call)[0], want, rtol=1e-5, atol=1e-5)
    # attn2's norms are modules' then, its text's and its image's
    assert seen.calls == {
        OPS.rms_norm_.default: 2 * tiny.BLOCKS, OPS.rms_norm.default: 3 * tiny.BLOCKS, OPS.gelu_.default: tiny.BLOCKS
    }  # fmt: skip


def test_modules_of_other_families():
    """Heads' norms as diffusers has them, and what is not ours: a bias, erf."""
    x = torch.randn(2, 5, 4, 64).bfloat16()
    norms = nn.ModuleList([RMSNorm(64, 1e-6), RMSNorm(64, 1e-6, elementwise_affine=False), nn.RMSNorm(64, 1e-6)])
    norms.extend([RMSNorm(64, 1e-6, bias=True), nn.RMSNorm(64), nn.RMSNorm((4, 64), 1e-6)])
    gelus = nn.ModuleList([GELU(64, 32, approximate="tanh"), GELU(64, 32)])
    model = nn.ModuleList([norms, gelus]).bfloat16()
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                norm.weight.normal_()
        want = [module(x) for module in (*norms, *gelus)]
        assert mxdit.fuse_(model).paths == ("0.0", "0.1", "0.2", "1.0")
        for module, expected in zip((*norms, *gelus), want, strict=True):
            torch.testing.assert_close(module(x), expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("reason", [None, "no CUDA device"])
def test_on_a_gpu_it_asks_for_kernels(monkeypatch, reason):
    """Fake tensors of one: the ops are called where kernels answer, and torch's own computes where the reference would."""
    monkeypatch.setattr(cuda, "why_not", lambda index: reason)
    model = nn.Sequential(nn.RMSNorm(64, 1e-6), GELU(64, 64, approximate="tanh"), RMSNorm(64, 1e-6))
    mxdit.fuse_(model)
    mode = FakeTensorMode()
    place = torch.device("cuda", 0)
    there = {name: FakeTensor(mode, value.detach().to("meta"), place) for name, value in model.state_dict().items()}
    with mode, Ops() as seen:
        out = torch.func.functional_call(model, there, FakeTensor(mode, torch.empty(2, 64, device="meta"), place))
    assert (out.device, out.shape) == (place, (2, 64))
    assert seen.calls == ({} if reason else {OPS.rms_norm.default: 2, OPS.gelu_.default: 1})


def test_what_a_new_diffusers_may_have_changed_is_left_alone(monkeypatch, caplog):
    monkeypatch.setitem(diffusers_fused.KNOWN, WanAttnProcessor, ("__call__", frozenset({"another"})))
    diffusers_fused._known.cache_clear()
    model = tiny.transformer()
    with caplog.at_level(logging.WARNING, "mxdit"):
        mxdit.fuse_(model)
    diffusers_fused._known.cache_clear()
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor
    assert ["WanAttnProcessor.__call__" in record.message for record in caplog.records] == [True]
    assert ops_of(model)[1] == {OPS.rms_norm.default: 4 * tiny.BLOCKS, OPS.gelu_.default: tiny.BLOCKS}


@pytest.mark.slow
def test_a_fused_block_is_one_graph():
    model = transformer(torch.bfloat16)
    mxdit.fuse_(model)
    want = tiny.forward(model)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert torch.equal(tiny.forward(model), want)


def test_a_session(tmp_path):
    model, frames = tiny.save(tmp_path / "wan"), []
    for fused in (False, True):
        session = mxdit.Session.open(model, dtype=torch.float32, fused=fused)
        request = session.request(prompt="a red seven", size=(16, 16), frames=5, steps=2)
        with Ops() as seen:
            frames.append(torch.from_numpy(session.run(request).frames))
        assert {op for op in OF_A_BLOCK if op in seen.calls} == (set(OF_A_BLOCK) if fused else set())
    assert (frames[0].int() - frames[1].int()).abs().max() <= 1
