"""HiDream-I1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def hidream_image(**overrides: Any) -> HiDreamImageTransformer2DModel:
    """Two blocks of each list, d=224, so that the last linear of an expert has K=768."""
    config = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 7,
        "caption_channels": [TEXT, TEXT],
        "text_emb_dim": 2 * TEXT,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (16, 16),
        "llama_layers": [0, 1, 1, 1],
    }
    return seeded(lambda: HiDreamImageTransformer2DModel(**(config | overrides)))


def hidream_image_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 tokens of an image, so that every expert gets some, 6 of T5 and 5 of each of two layers of Llama."""
    return {
        "hidden_states": normal(model, 24, 1, 4, 16, 16),
        "timesteps": torch.tensor([700.0]),
        "encoder_hidden_states_t5": normal(model, 25, 1, 6, TEXT),
        "encoder_hidden_states_llama3": normal(model, 26, 2, 1, 5, TEXT),
        "pooled_embeds": normal(model, 27, 1, 2 * TEXT),
    }


TINY = {"HiDreamImageTransformer2DModel": Tiny(hidream_image, hidream_image_inputs)}
