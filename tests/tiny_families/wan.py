"""Wan at tiny size, as the rest of the suite has it in `tiny`."""

from __future__ import annotations

from typing import Any

import torch

import tiny
from tiny_families.parts import TEXT, Tiny, normal


def wan_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, 6 tokens of text, and 257 of an image where the model takes one."""
    width = model.config.image_dim
    return {
        "hidden_states": normal(model, 8, 1, model.config.in_channels, 2, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 9, 1, 6, tiny.TEXT_DIM),
        "encoder_hidden_states_image": normal(model, 10, 1, 257, width) if width else None,
    }


WAN21_I2V = {"added_kv_proj_dim": 64, "image_dim": TEXT}
TINY = {"WanTransformer3DModel": Tiny(tiny.transformer, wan_inputs, tiny.pipeline, (16, 16), 5, WAN21_I2V)}
