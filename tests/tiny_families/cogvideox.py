"""CogVideoX at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)

from tiny_families.parts import TEXT, Tiny, normal, seeded, t5, t5_tokenizer


def cogvideox(**overrides: Any) -> CogVideoXTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT,
        "num_layers": 2,
        "sample_height": 8,
        "sample_width": 12,
        "sample_frames": 5,
        "max_text_seq_length": 6,
    }
    return seeded(lambda: CogVideoXTransformer3DModel(**(config | overrides)))


def cogvideox_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 1, 1, 2, 4, 4, 6),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
    }


def cogvideox_pipeline(task: str) -> DiffusionPipeline:
    """T5, a VAE of stride 4 in time and space, and for I2V twice the channels: half of them are the image's."""
    vae: dict[str, Any] = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3,
        "block_out_channels": (8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    }  # fmt: skip
    made, channels = {"t2v": (CogVideoXPipeline, 4), "i2v": (CogVideoXImageToVideoPipeline, 8)}[task]
    return made(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=seeded(lambda: AutoencoderKLCogVideoX(**vae)).bfloat16(),
        transformer=cogvideox(in_channels=channels, use_rotary_positional_embeddings=True).bfloat16(),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
    )


TINY = {"CogVideoXTransformer3DModel": Tiny(cogvideox, cogvideox_inputs, cogvideox_pipeline, (16, 24), 9)}
