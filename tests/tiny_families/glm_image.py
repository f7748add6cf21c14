"""GLM-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import GlmImageTransformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def glm_image(**overrides: Any) -> GlmImageTransformer2DModel:
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
        "prior_vq_quantizer_codebook_size": 64,
    }
    return seeded(lambda: GlmImageTransformer2DModel(**(config | overrides)))


def glm_image_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 tokens of an image, as many of the coarse one that it follows, and 6 of text."""
    return {
        "hidden_states": normal(model, 22, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 23, 1, 6, TEXT),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": torch.tensor([700.0]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


TINY = {"GlmImageTransformer2DModel": Tiny(glm_image, glm_image_inputs)}
