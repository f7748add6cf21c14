"""EasyAnimate at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EasyAnimateTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def easyanimate(**overrides: Any) -> EasyAnimateTransformer3DModel:
    """One block with weights for the text and one without, d=160, so that the FFN's second linear has K=640."""
    config = {
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT,
    }
    return seeded(lambda: EasyAnimateTransformer3DModel(**(config | overrides)))


def easyanimate_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
    }


TINY = {"EasyAnimateTransformer3DModel": Tiny(easyanimate, easyanimate_inputs)}
