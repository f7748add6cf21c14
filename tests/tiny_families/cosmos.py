"""Cosmos 1 to Predict2.5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CosmosTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded

LOOKED_AT = 48  # width of the image encoder's tokens


def cosmos(**overrides: Any) -> CosmosTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640.

    It has no padding mask, which is scaled by torchvision and is one channel of the patches alone.
    """
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "text_embed_dim": TEXT,
        "adaln_lora_dim": 32,
        "max_size": (4, 8, 8),
        "concat_padding_mask": False,
    }
    return seeded(lambda: CosmosTransformer3DModel(**(config | overrides)))


def cosmos_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents, 6 tokens of text, and 3 of an image where the model looks at one."""
    text = normal(model, 2, 1, 6, TEXT)
    width = model.config.img_context_dim_in
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": (text, normal(model, 3, 1, 3, width)) if width else text,
        "fps": 16,
    }


TRANSFER25 = {"img_context_dim_in": LOOKED_AT, "img_context_dim_out": 160, "extra_pos_embed_type": None}
TINY = {"CosmosTransformer3DModel": Tiny(cosmos, cosmos_inputs, more=TRANSFER25)}
