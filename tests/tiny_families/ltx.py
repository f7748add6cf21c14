"""LTX-Video at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def ltx(**overrides: Any) -> LTXVideoTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "cross_attention_dim": 160,
        "num_layers": 2,
        "caption_channels": TEXT,
    }
    return seeded(lambda: LTXVideoTransformer3DModel(**(config | overrides)))


def ltx_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 2 x 3 latents, and 6 tokens of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 1, 1, 12, 8),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "num_frames": 2,
        "height": 2,
        "width": 3,
    }


TINY = {"LTXVideoTransformer3DModel": Tiny(ltx, ltx_inputs)}
