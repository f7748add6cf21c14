"""PixArt (alpha and sigma) at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from tiny_families.parts import TEXT, Tiny, image_vae, normal, seeded, t5, t5_tokenizer


def pixart(**overrides: Any) -> PixArtTransformer2DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 8,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "cross_attention_dim": 160,
        "caption_channels": TEXT,
        "sample_size": 8,
    }
    return seeded(lambda: PixArtTransformer2DModel(**(config | overrides)))


def pixart_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 26, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 27, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
    }


def pixart_pipeline(task: str) -> DiffusionPipeline:
    """T5 and a VAE of stride 2."""
    assert task == "t2i"
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=image_vae(),
        transformer=pixart().bfloat16(),
        scheduler=DPMSolverMultistepScheduler(),
    )


TINY = {"PixArtTransformer2DModel": Tiny(pixart, pixart_inputs, pixart_pipeline, (16, 24))}
