"""MiniMax-H3 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded


def minimax_h3(**overrides: Any) -> MiniMaxH3Transformer3DModel:
    """Two blocks, d=64, and a feed-forward whose second linear has K=544; one block of the text's refiner."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "hidden_size": 64,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 544,
        "in_channels": 4,
        "audio_in_channels": 4,
        "text_dim": TEXT,
        "freq_dim": 32,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 32,
        "rope_freq_dim": 4,
    }
    return seeded(lambda: MiniMaxH3Transformer3DModel(**(config | overrides)))


def minimax_h3_inputs(model: Any) -> dict[str, Any]:
    """One sequence, all of it at one timestep: 6 tokens of text, 3 of sound, and 2 frames of 2 x 2 patches."""
    frames = torch.cartesian_prod(torch.arange(6.0, 8.0), torch.arange(2.0), torch.arange(2.0))
    before = torch.arange(9.0)[:, None].expand(9, 3)
    return {
        "hidden_states": normal(model, 23, 1, 8, 16),
        "audio_hidden_states": normal(model, 24, 1, 3, 4),
        "encoder_hidden_states": normal(model, 25, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "timestep_indices": torch.zeros(17, dtype=torch.long),
        "token_tags": torch.tensor([1] * 6 + [2] * 3 + [0] * 8),
        "position_ids": torch.cat([before, frames]),
        "video_indices": torch.arange(9, 17),
        "audio_indices": torch.arange(6, 9),
        "text_indices": torch.arange(6),
    }


TINY = {"MiniMaxH3Transformer3DModel": Tiny(minimax_h3, minimax_h3_inputs, None, (16, 24), 5)}
