"""Krea 2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Krea2Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def krea2(**overrides: Any) -> Krea2Transformer2DModel:
    """Two blocks, whose FFN's last linear has K=640; one block of each part of the text's fusion."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 640,
        "timestep_embed_dim": 32,
        "text_hidden_dim": TEXT,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 64,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 12, 12),
    }
    return seeded(lambda: Krea2Transformer2DModel(**(config | overrides)))


def krea2_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text, of three layers of its encoder."""
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return {
        "hidden_states": normal(model, 33, 1, 16, 16),
        "encoder_hidden_states": normal(model, 34, 1, 6, 3, TEXT),
        "timestep": torch.tensor([0.7]),
        "position_ids": torch.cat([torch.zeros(6, 3), image]),
    }


TINY = {"Krea2Transformer2DModel": Tiny(krea2, krea2_inputs)}
