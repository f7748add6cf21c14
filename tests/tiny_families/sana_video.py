"""SANA-Video at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)

from tiny_families.parts import TEXT, Tiny, gemma2, gemma_tokenizer, normal, seeded


def sana_video(**overrides: Any) -> SanaVideoTransformer3DModel:
    """Two blocks, d=64; cross-attention is wider, so that its output projection has K=640."""
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_cross_attention_heads": 5,
        "cross_attention_head_dim": 128,
        "cross_attention_dim": 64,
        "caption_channels": TEXT,
        "sample_size": 4,
    }
    return seeded(lambda: SanaVideoTransformer3DModel(**(config | overrides)))


def sana_video_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 13, 1, 16, 2, 4, 4),
        "encoder_hidden_states": normal(model, 14, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
    }


def sana_video_pipeline(task: str) -> DiffusionPipeline:
    """Gemma 2 and Wan's VAE, in FP32 as Wan's pipelines have it."""
    vae: dict[str, Any] = {
        "base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }  # fmt: skip
    cls = {"t2v": SanaVideoPipeline, "i2v": SanaImageToVideoPipeline}[task]
    return cls(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2(),
        vae=seeded(lambda: AutoencoderKLWan(**vae)),
        transformer=sana_video().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )


TINY = {"SanaVideoTransformer3DModel": Tiny(sana_video, sana_video_inputs, sana_video_pipeline, (32, 64), 5)}
