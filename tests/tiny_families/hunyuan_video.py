"""HunyuanVideo and FramePack at tiny size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanVideoFramepackTransformer3DModel, HunyuanVideoTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded

_SIZES = {  # d=160, so that the FFN's second linear has K=640 and a single block's proj_out K=800
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "rope_axes_dim": (8, 12, 12),
}


def hunyuan(cls: Any, **own: Any) -> Callable[..., Any]:
    return lambda **overrides: seeded(lambda: cls(**(_SIZES | own | overrides)))


def inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents and 6 tokens of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 4, 1, model.config.in_channels, 2, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 5, 1, 6, TEXT),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "pooled_projections": normal(model, 6, 1, TEXT),
        "guidance": torch.tensor([6000.0]),
    }


def framepack_inputs(model: Any) -> dict[str, Any]:
    """The same, 3 tokens of an image, and the frames before: one as it is, two at half and four at a quarter of the size."""
    return inputs(model) | {
        "image_embeds": normal(model, 7, 1, 3, TEXT),
        "indices_latents": torch.arange(7, 9),
        "latents_clean": normal(model, 8, 1, 4, 1, 4, 4),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": normal(model, 9, 1, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": normal(model, 10, 1, 4, 4, 4, 4),
        "indices_latents_history_4x": torch.arange(4),
    }


def hosted(task: str) -> DiffusionPipeline:
    raise AssertionError("only hosts hold it")


_FRAMEPACK = {"has_image_proj": True, "image_proj_dim": TEXT, "has_clean_x_embedder": True}
TINY = {
    "HunyuanVideoTransformer3DModel": Tiny(
        hunyuan(HunyuanVideoTransformer3DModel), inputs, hosted, (16, 16), 5, {"image_condition_type": "token_replace"}
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        hunyuan(HunyuanVideoFramepackTransformer3DModel, **_FRAMEPACK), framepack_inputs, hosted, (16, 16), 5
    ),
}
