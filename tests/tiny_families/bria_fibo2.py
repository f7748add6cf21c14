"""Fibo 2.0 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BriaFibo2Transformer2DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def bria_fibo2(**overrides: Any) -> BriaFibo2Transformer2DModel:
    """Two blocks, the second of which reads the text, and one that refines, d=288, so that the FFN's last has K=768."""
    config = {
        "in_channels": 4,
        "dim": 288,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 9,
        "cap_feat_dim": TEXT,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 8,
        "axes_dims": (8, 12, 12),
        "axes_lens": (32, 16, 16),
    }
    model = seeded(lambda: BriaFibo2Transformer2DModel(**(config | overrides)))
    model.layers[1].cross_attn_gate.data.fill_(1.0)  # it begins with none of the text
    return model


def bria_fibo2_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 tokens of an image, and 6 of text for the gist and for one layer."""
    return {
        "hidden_states": normal(model, 38, 1, 4, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": normal(model, 39, 1, 2, 6, TEXT),
    }


TINY = {"BriaFibo2Transformer2DModel": Tiny(bria_fibo2, bria_fibo2_inputs)}
