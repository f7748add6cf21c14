"""FLUX.3 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux3Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def flux3(**overrides: Any) -> Flux3Transformer2DModel:
    """One block of each list for one kind of token and two for all, d=192, so that ff.linear_out has K=576."""
    config = {
        "in_channels": 16,
        "cond_in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 6,
        "joint_attention_dim": TEXT,
        "timestep_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return seeded(lambda: Flux3Transformer2DModel(**(config | overrides)))


def flux3_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image, 4 of an image to follow, and 6 of text."""
    return {
        "hidden_states": normal(model, 33, 1, 16, 16),
        "encoder_hidden_states": normal(model, 34, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
        "txt_ids": torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(6.0)),
        "image_cond_hidden_states": normal(model, 35, 1, 4, 16),
        "image_cond_ids": torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(2.0), torch.zeros(1)),
    }


TINY = {"Flux3Transformer2DModel": Tiny(flux3, flux3_inputs, None, (16, 24))}
