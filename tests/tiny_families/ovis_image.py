"""Ovis-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from transformers import Qwen3Model

from tiny_families.parts import TEXT, Tiny, image_vae, normal, qwen3, qwen_tokenizer, seeded


def ovis_image(**overrides: Any) -> OvisImageTransformer2DModel:
    """Two blocks of each list, d=160, so that a single block's proj_out has K=800."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (8, 12, 12),
        "out_channels": 16,
    }
    return seeded(lambda: OvisImageTransformer2DModel(**(config | overrides)))


def ovis_image_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": normal(model, 31, 1, 16, 16),
        "encoder_hidden_states": normal(model, 32, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def ovis_image_pipeline(task: str) -> DiffusionPipeline:
    """Qwen3, a VAE of stride 2."""
    assert task == "t2i"
    return OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=qwen3(Qwen3Model, 1),
        tokenizer=qwen_tokenizer(),
        transformer=ovis_image().bfloat16(),
    )


TINY = {"OvisImageTransformer2DModel": Tiny(ovis_image, ovis_image_inputs, ovis_image_pipeline)}
