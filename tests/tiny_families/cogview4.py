"""CogView 4 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogView4Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


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


TINY = {"CogView4Transformer2DModel": Tiny(cogview4, cogview4_inputs, None, (16, 24))}
