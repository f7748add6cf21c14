"""Krea 2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from transformers import Qwen3VLModel

from tiny_families.parts import TEXT, Tiny, normal, qwen3_vl, qwen_image_vae, qwen_tokenizer, seeded


def krea2(**overrides: Any) -> Krea2Transformer2DModel:
    """Two blocks, whose FFN's last linear has K=640; one block of each part of the text's fusion."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 640,
        "timestep_embed_dim": 32,
        "text_hidden_dim": TEXT,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 64,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 12, 12),
    }
    return seeded(lambda: Krea2Transformer2DModel(**(config | overrides)))


def krea2_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text, of three layers of its encoder."""
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": normal(model, 33, 1, 16, 16),
        "encoder_hidden_states": normal(model, 34, 1, 6, 3, TEXT),
        "timestep": torch.tensor([0.7]),
        "position_ids": torch.cat([torch.zeros(6, 3), image]),
    }


def krea2_pipeline(task: str) -> DiffusionPipeline:
    """Qwen3-VL of two layers, of which the embedding and both are taken; a VAE of stride 2."""
    assert task == "t2i"
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=qwen_image_vae(),
        text_encoder=qwen3_vl(Qwen3VLModel, 2),
        tokenizer=qwen_tokenizer(),
        transformer=krea2().bfloat16(),
        text_encoder_select_layers=(0, 1, 2),
    )


TINY = {"Krea2Transformer2DModel": Tiny(krea2, krea2_inputs, krea2_pipeline)}
