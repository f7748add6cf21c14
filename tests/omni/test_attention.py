"""Attention of ours, chosen by name among the engine's backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
from vllm_omni.diffusion.attention.layer import Attention
from vllm_omni.platforms import current_omni_platform

from layers import building
from mxdit.errors import BackendError, ConfigError, FormatError
from mxdit.integrations import diffusers_attention, vllm_omni
from mxdit.integrations.vllm_omni.attention import BACKENDS
from test_baseline import assert_same_video, by_name

HEADS, WIDTH = 4, 32
ROLES = {"default": "MXDIT", "per_role": {"self": "MXDIT_INT8"}}


def layer(name: str | dict[str, Any] | None, role: str = "self", ring: int = 1, causal: bool = False) -> Attention:
    """What a block of the engine makes for itself."""
    vllm_omni.register()
    given = {"default": name} if isinstance(name, str) else name
    with building(attention=given, ring=ring):
        return Attention(HEADS, WIDTH, causal, WIDTH**-0.5, num_kv_heads=2, role=role)


def qkv(keys: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch of two, 9 queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 9, HEADS, WIDTH), (2, keys, 2, WIDTH), (2, keys, 2, WIDTH)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return q, k, v


MASKS = {
    "no mask": None,
    "keys": torch.arange(70).expand(2, 70) < torch.tensor([[60], [70]]),
    "keys, by numbers": (torch.arange(70).expand(2, 70) < torch.tensor([[60], [70]])).long(),
    "queries and keys": torch.arange(70).expand(2, 1, 9, 70) < 60 + torch.arange(9)[:, None],
    "added": torch.linspace(-4, 4, 70).expand(2, HEADS, 9, 70),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", BACKENDS)
def test_it_is_that_of_diffusers(method, mask):
    given, (q, k, v) = MASKS[mask], qkv()
    metadata = None if given is None else AttentionMetadata(attn_mask=given)
    with torch.no_grad():
        found = layer(BACKENDS[method])(q, k, v, metadata)
        same = given.bool() if mask == "keys, by numbers" and given is not None else given
        name = AttentionBackendName(diffusers_attention.BACKENDS[method])
        assert torch.equal(found, dispatch_attention_fn(q, k, v, same, enable_gqa=True, backend=name))
        torch.testing.assert_close(found, layer(None)(q, k, v, metadata), rtol=0.02, atol=0.02)  # the platform's own


def test_it_may_be_causal():
    q, _, _ = qkv()
    _, k, v = qkv(keys=9)
    with torch.no_grad():
        given = [layer(name, causal=True)(q, k, v) for name in (*BACKENDS.values(), "TORCH_SDPA")]
    for found in given[:2]:
        torch.testing.assert_close(found, given[2], rtol=0.02, atol=0.02)


def test_it_is_chosen_by_name_and_by_role_and_never_by_itself():
    made = {role: layer(ROLES, role).attn_backend for role in ("self", "cross")}
    assert {role: backend and backend.get_name() for role, backend in made.items()} == {
        "self": "MXDIT_INT8",
        "cross": "MXDIT",
    }
    assert layer("mxdit").attn_backend is made["cross"]  # the engine minds no case
    names = {layer(name).attention.__class__.__name__ for name in (None, "auto", "TORCH_SDPA")}
    assert names == {"CpuSDPAImpl"}


def test_names_are_the_engines_as_its_own_are():
    vllm_omni.register()
    vllm_omni.register()
    names = [member.name for member in DiffusionAttentionBackendEnum]
    assert [name for name in names if "MXDIT" in name] == [*BACKENDS.values()]
    for name in BACKENDS.values():
        member = DiffusionAttentionBackendEnum[name]
        assert member.get_class().get_name() == name and DiffusionAttentionBackendEnum(member.value) is member
    with pytest.raises(ValueError, match=r"Valid options are: .*MXDIT, MXDIT_INT8"):
        DiffusionAttentionBackendEnum["MXDIT_FP8"]


def test_a_device_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(current_omni_platform, "get_torch_device", lambda *_: torch.device("xpu"))
    with pytest.raises(BackendError, match=r"MXDIT_INT8: no kernel of mxdit attends on this device; got xpu"):
        layer("MXDIT_INT8")


def test_a_ring_of_ranks_is_refused():
    with pytest.raises(ConfigError, match="MXDIT: ring attention calls no backend of mxdit; got ring_degree=2"):
        layer("MXDIT", ring=2)


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="the mask does not broadcast"):
        layer("MXDIT")(*qkv(), AttentionMetadata(attn_mask=torch.ones(2, 71, dtype=torch.bool)))


def test_two_ranks_attend_to_their_own_heads(directories, ran):
    """The first block's attention begins with the same queries, keys and values as the platform's own."""
    own = ran(directories["t2v"], tensor_parallel_size=2)
    record = ran(directories["t2v"], tensor_parallel_size=2, diffusion_attention_config=ROLES)
    log = (record.folder / "log.txt").read_text()
    for role, name in (("self", "MXDIT_INT8"), ("cross", "MXDIT")):
        assert f"Resolved diffusion attention backend '{name}' for role='{role}'" in log
    path = "transformer.blocks.0.attn1.to_out"
    for found, wanted in zip(by_name(record)[path], by_name(own)[path], strict=True):
        a, b = (one.tensors["input"].float() for one in (found, wanted))
        assert 0 < (a - b).norm() < 0.02 * b.norm()
    assert_same_video(own, record.video())
