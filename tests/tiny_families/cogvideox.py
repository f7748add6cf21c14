"""CogVideoX at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def cogvideox(**overrides: Any) -> CogVideoXTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT,
        "num_layers": 2,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 5,
        "max_text_seq_length": 6,
    }
    return seeded(lambda: CogVideoXTransformer3DModel(**(config | overrides)))


def cogvideox_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 1, 1, 2, 4, 4, 6),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700]),
    }


TINY = {"CogVideoXTransformer3DModel": Tiny(cogvideox, cogvideox_inputs)}
