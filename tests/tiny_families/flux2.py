"""FLUX.2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def flux2(**overrides: Any) -> Flux2Transformer2DModel:
    """Two blocks of each list, d=160, so that a single block's to_out has K=640; three layers of the text encoder's."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": 3 * TEXT,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return seeded(lambda: Flux2Transformer2DModel(**(config | overrides)))


def flux2_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    one = torch.zeros(1)
    return {
        "hidden_states": normal(model, 11, 1, 16, 16),
        "encoder_hidden_states": normal(model, 12, 1, 6, 3 * TEXT),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]) if model.config.guidance_embeds else None,
        "img_ids": torch.cartesian_prod(one, torch.arange(4.0), torch.arange(4.0), one),
        "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(6.0)),
    }


TINY = {"Flux2Transformer2DModel": Tiny(flux2, flux2_inputs)}
