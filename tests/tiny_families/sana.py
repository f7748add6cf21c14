"""Sana at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)

from tiny_families.parts import TEXT, Tiny, gemma2, gemma_tokenizer, normal, seeded


def sana(**overrides: Any) -> SanaTransformer2DModel:
    """Two blocks, d=64; cross-attention is wider, so that its output projection has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_cross_attention_heads": 5,
        "cross_attention_head_dim": 128,
        "cross_attention_dim": 64,
        "caption_channels": TEXT,
        "sample_size": 4,
    }
    return seeded(lambda: SanaTransformer2DModel(**(config | overrides)))


def sana_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 11, 1, 4, 4, 4),
        "encoder_hidden_states": normal(model, 12, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
    }


def sana_pipeline(task: str) -> DiffusionPipeline:
    """Gemma 2 and a deep-compression VAE of stride 4."""
    assert task == "t2i"
    sides = {
        side: value
        for coder in ("encoder", "decoder")
        for side, value in {
            f"{coder}_block_types": "ResBlock", f"{coder}_block_out_channels": (4, 4, 4),
            f"{coder}_layers_per_block": (1, 1, 1), f"{coder}_qkv_multiscales": ((), (), ()),
        }.items()
    }  # fmt: skip
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma2(),
        vae=seeded(lambda: AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides)).bfloat16(),
        transformer=sana().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


TINY = {"SanaTransformer2DModel": Tiny(sana, sana_inputs, sana_pipeline, (32, 64))}
