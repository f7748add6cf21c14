"""Single layers of the engine, with no engine around them: what it makes and asks while it builds a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm_omni.diffusion.config import set_current_diffusion_config
from vllm_omni.diffusion.data import TransformerConfig, parse_attention_config

import tiny
from mxdit.integrations.vllm_omni.config import MXOmniConfig

MODEL = {"_class_name": "WanTransformer3DModel", **tiny.transformer().config}


@contextmanager
def building(
    model: Mapping[str, Any] = MODEL,
    degree: int = 1,
    rank: int = 0,
    active: Any = None,
    detected: bool = False,
    attention: Any = None,
    ring: int = 1,
) -> Iterator[None]:
    """While it lasts, the engine builds a transformer on a rank.

    active: the `quantization_config` that a user gave, or that the engine read itself where it is ``detected``.
    attention: the `diffusion_attention_config` that a user gave.
    ring: the degree of ring attention.
    """
    engine: Any = SimpleNamespace(
        model="nowhere",
        tf_model_config=TransformerConfig(params=dict(model)),
        parallel_config=SimpleNamespace(use_hsdp=False, ring_degree=ring),
        diffusion_attention_config=parse_attention_config(attention),
        quantization_config=active,
        quantization_config_is_auto_detected=detected,
    )
    group: dict[str, Any] = {
        "get_tensor_model_parallel_rank": lambda: rank,
        "get_tensor_model_parallel_world_size": lambda: degree,
    }
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        for module in (linear, parameter):
            stack.enter_context(patch.multiple(module, **group))
        stack.enter_context(set_current_diffusion_config(engine))
        yield


def made(kind: type, *sizes: Any, name: str, method: str, keys: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A linear of the engine, with nothing in it yet; call it while `building`."""
    return kind(
        *sizes,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=MXOmniConfig(method, keys or {}),
        prefix=name,
        return_bias=False,
        **options,
    )
