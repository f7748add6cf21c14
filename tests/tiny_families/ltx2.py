"""LTX-2 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel

from tiny_families.parts import TEXT, Tiny, normal, seeded

VIDEO, AUDIO = 160, 64  # widths of the two streams


def ltx2(**overrides: Any) -> LTX2VideoTransformer3DModel:
    """Two blocks, d=160 for the video, so that its FFN's second linear has K=640."""
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "cross_attention_dim": VIDEO,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": AUDIO,
        "num_layers": 2,
        "caption_channels": TEXT,
    }
    return seeded(lambda: LTX2VideoTransformer3DModel(**(config | overrides)))


def ltx2_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 2 x 3 latents, 5 of sound, and 6 tokens of text, projected for each stream where the model does not."""
    projects = model.config.use_prompt_embeddings
    return {
        "hidden_states": normal(model, 1, 1, 12, 8),
        "audio_hidden_states": normal(model, 2, 1, 5, 8),
        "encoder_hidden_states": normal(model, 3, 1, 6, TEXT if projects else VIDEO),
        "audio_encoder_hidden_states": normal(model, 4, 1, 6, TEXT if projects else AUDIO),
        "timestep": torch.tensor([700.0]),
        "sigma": torch.tensor([700.0]),
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "fps": 24.0,
        "audio_num_frames": 5,
    }


# What the config of LTX-2.3 has beyond that of LTX-2.
LTX23 = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
TINY = {"LTX2VideoTransformer3DModel": Tiny(ltx2, ltx2_inputs, more=LTX23)}
