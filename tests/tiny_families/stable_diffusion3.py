"""Stable Diffusion 3 and 3.5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def sd3(**overrides: Any) -> SD3Transformer2DModel:
    """Two blocks, the last of which ends the text's side, d=160, so that the FFN's second linear has K=640."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 160,
        "pooled_projection_dim": 2 * TEXT,  # of two text encoders
        "pos_embed_max_size": 12,
    }
    return seeded(lambda: SD3Transformer2DModel(**(config | overrides)))


def sd3_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 28, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 29, 1, 6, TEXT),
        "pooled_projections": normal(model, 30, 1, 2 * TEXT),
        "timestep": torch.tensor([700.0]),
    }


SD35_MEDIUM = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
TINY = {"SD3Transformer2DModel": Tiny(sd3, sd3_inputs, None, (16, 24), more=SD35_MEDIUM)}
