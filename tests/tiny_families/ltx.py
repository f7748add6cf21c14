"""LTX-Video at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tiny_families.parts import TEXT, Tiny, normal, seeded, t5, t5_tokenizer


def ltx(**overrides: Any) -> LTXVideoTransformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config: dict[str, Any] = {
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


def ltx_pipeline(task: str) -> DiffusionPipeline:
    """T5, and a VAE of stride 2 in time and 16 in space."""
    vae: dict[str, Any] = {
        "latent_channels": 8, "block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
        "down_block_types": ("LTXVideoDownBlock3D",) * 2, "layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "spatio_temporal_scaling": (True, False),
        "decoder_spatio_temporal_scaling": (True, False), "decoder_inject_noise": (False,) * 3,
        "upsample_residual": (False,) * 2, "upsample_factor": (1, 1), "patch_size": 8,
    }  # fmt: skip
    made = {"t2v": LTXPipeline, "i2v": LTXImageToVideoPipeline}[task]
    return made(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=seeded(lambda: AutoencoderKLLTXVideo(**vae)).bfloat16(),
        text_encoder=t5(64),
        tokenizer=t5_tokenizer(),
        transformer=ltx().bfloat16(),
    )


TINY = {"LTXVideoTransformer3DModel": Tiny(ltx, ltx_inputs, ltx_pipeline, (32, 64), 5)}
