"""SANA-Video at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaVideoTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def sana_video(**overrides: Any) -> SanaVideoTransformer3DModel:
    """Two blocks, d=64; cross-attention is wider, so that its output projection has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_cross_attention_heads": 5,
        "cross_attention_head_dim": 128,
        "cross_attention_dim": 64,
        "caption_channels": TEXT,
        "sample_size": 4,
    }
    return seeded(lambda: SanaVideoTransformer3DModel(**(config | overrides)))


def sana_video_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 13, 1, 4, 2, 4, 4),
        "encoder_hidden_states": normal(model, 14, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
    }


TINY = {"SanaVideoTransformer3DModel": Tiny(sana_video, sana_video_inputs, None, (16, 24), 5)}
