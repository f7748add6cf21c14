"""Mochi 1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MochiTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def mochi(**overrides: Any) -> MochiTransformer3DModel:
    """Two blocks, d=96; the text's stream is the wider one here, so that its FFN's second linear has K=768."""
    config = {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "num_layers": 2,
        "pooled_projection_dim": 288,
        "in_channels": 4,
        "text_embed_dim": TEXT,
        "time_embed_dim": 32,
        "max_sequence_length": 6,
    }
    return seeded(lambda: MochiTransformer3DModel(**(config | overrides)))


def mochi_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, True, False]]),
    }


TINY = {"MochiTransformer3DModel": Tiny(mochi, mochi_inputs)}
