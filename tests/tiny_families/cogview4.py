"""CogView 4 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tiny_families.parts import TEXT, Tiny, image_vae, llama_tokenizer, normal, seeded


def cogview4(**overrides: Any) -> CogView4Transformer2DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "text_embed_dim": TEXT,
        "time_embed_dim": 32,
        "condition_dim": 8,
        "pos_embed_max_size": 8,
        "sample_size": 8,
        "rope_axes_dim": (16, 16),
    }
    return seeded(lambda: CogView4Transformer2DModel(**(config | overrides)))


def cogview4_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    size = torch.tensor([[16.0, 16.0]], dtype=model.dtype)
    return {
        "hidden_states": normal(model, 40, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 41, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def cogview4_pipeline(task: str) -> DiffusionPipeline:
    """GLM of two layers, for the pipeline takes the output of the last but one; a VAE of stride 2."""
    assert task == "t2i"
    glm = GlmConfig(
        vocab_size=64, hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    return CogView4Pipeline(
        tokenizer=llama_tokenizer(),
        text_encoder=seeded(lambda: GlmModel(glm)).bfloat16(),
        vae=image_vae(),
        transformer=cogview4().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    )


TINY = {"CogView4Transformer2DModel": Tiny(cogview4, cogview4_inputs, cogview4_pipeline, (16, 32))}
