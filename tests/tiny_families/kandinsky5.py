"""Kandinsky 5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def _made(config: dict[str, Any]) -> Kandinsky5Transformer3DModel:
    """With modulations as if trained: the class makes them zero, and with them what a block adds."""
    model = Kandinsky5Transformer3DModel(**config)
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def kandinsky5(**overrides: Any) -> Kandinsky5Transformer3DModel:
    """Two visual blocks, d=64, and a feed-forward whose second linear has K=544; one block of text."""
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": TEXT,
        "in_text_dim2": TEXT,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 544,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
        "visual_cond": True,
    }
    return seeded(lambda: _made(config | overrides))


def kandinsky5_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, with the given frames' and their mask, and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 15, 1, 2, 4, 4, 9),
        "encoder_hidden_states": normal(model, 16, 1, 6, TEXT),
        "pooled_projections": normal(model, 17, 1, TEXT),
        "timestep": torch.tensor([700.0], dtype=model.dtype),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(6),
    }


TINY = {"Kandinsky5Transformer3DModel": Tiny(kandinsky5, kandinsky5_inputs, None, (16, 24), 5)}
