"""Stable Diffusion 3 and 3.5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tiny_families.parts import TEXT, Tiny, clip_tokenizer, image_vae, normal, seeded, t5, t5_tokenizer


def sd3(**overrides: Any) -> SD3Transformer2DModel:
    """Two blocks, the last of which ends the text's side, d=160, so that the FFN's second linear has K=640."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": 2 * TEXT,  # of two text encoders side by side
        "caption_projection_dim": 160,
        "pooled_projection_dim": 2 * TEXT,
        "pos_embed_max_size": 12,
    }
    return seeded(lambda: SD3Transformer2DModel(**(config | overrides)))


def sd3_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 28, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 29, 1, 6, 2 * TEXT),
        "pooled_projections": normal(model, 30, 1, 2 * TEXT),
        "timestep": torch.tensor([700.0]),
    }


def sd3_pipeline(task: str) -> DiffusionPipeline:
    """Two CLIPs, a T5 as wide as both, and a VAE of stride 2."""
    assert task == "t2i"
    tokenizer = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, projection_dim=TEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=sd3().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=seeded(lambda: CLIPTextModelWithProjection(clip)).bfloat16(),
        tokenizer=tokenizer,
        text_encoder_2=seeded(lambda: CLIPTextModelWithProjection(clip), 8).bfloat16(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64, 2 * TEXT),
        tokenizer_3=t5_tokenizer(),
    )


SD35_MEDIUM = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
TINY = {"SD3Transformer2DModel": Tiny(sd3, sd3_inputs, sd3_pipeline, (16, 24), more=SD35_MEDIUM)}
