"""Mochi 1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMochi,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from tiny_families.parts import TEXT, Tiny, normal, seeded, t5, t5_tokenizer


def mochi(**overrides: Any) -> MochiTransformer3DModel:
    """Two blocks, d=96; the text's stream is the wider one here, so that its FFN's second linear has K=768."""
    config: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "num_layers": 2,
        "pooled_projection_dim": 288,
        "in_channels": 4,
        "text_embed_dim": TEXT,
        "time_embed_dim": 32,
        "max_sequence_length": 6,
    }
    return seeded(lambda: MochiTransformer3DModel(**(config | overrides)))


def mochi_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "timestep": torch.tensor([700.0]),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, True, False]]),
    }


def mochi_pipeline(task: str) -> DiffusionPipeline:
    """T5, and a VAE of the stride that the pipeline takes for granted, 6 x 8 x 8."""
    assert task == "t2v"
    vae: dict[str, Any] = {
        "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "latent_channels": 4,
        "layers_per_block": (1,) * 5, "latents_mean": None, "latents_std": None,
    }  # fmt: skip
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=seeded(lambda: AutoencoderKLMochi(**vae)).bfloat16(),
        text_encoder=t5(64),
        tokenizer=t5_tokenizer(),
        transformer=mochi().bfloat16(),
    )


TINY = {"MochiTransformer3DModel": Tiny(mochi, mochi_inputs, mochi_pipeline, (16, 32), 7)}
