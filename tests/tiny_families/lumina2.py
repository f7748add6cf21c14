"""Lumina 2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tiny_families.parts import TEXT, Tiny, gemma2, gemma_tokenizer, image_vae, normal, seeded


def lumina2(**overrides: Any) -> Lumina2Transformer2DModel:
    """Two blocks, d=64, and a feed-forward whose last linear has K=544; one block of each refiner."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 64,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 544,
        "axes_dim_rope": (8, 12, 12),
        "axes_lens": (300, 64, 64),
        "cap_feat_dim": TEXT,
    }
    return seeded(lambda: Lumina2Transformer2DModel(**(config | overrides)))


def lumina2_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 36, 1, 4, 8, 8),
        "timestep": torch.tensor([0.3]),
        "encoder_hidden_states": normal(model, 37, 1, 6, TEXT),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.long),
    }


def lumina2_pipeline(task: str) -> DiffusionPipeline:
    """Gemma 2 and a VAE of stride 8, which the pipeline asks for."""
    assert task == "t2i"
    return Lumina2Pipeline(
        transformer=lumina2().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(4),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


TINY = {"Lumina2Transformer2DModel": Tiny(lumina2, lumina2_inputs, lumina2_pipeline, (32, 48))}
