"""EasyAnimate at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    DiffusionPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tiny_families.parts import TEXT, Tiny, normal, qwen_tokenizer, seeded


def easyanimate(**overrides: Any) -> EasyAnimateTransformer3DModel:
    """Two blocks, d=160, so that the FFNs' second linears have K=640."""
    config: dict[str, Any] = {
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "num_layers": 2,
        "mmdit_layers": 2,
        "time_embed_dim": 32,
        "text_embed_dim": TEXT,
    }
    return seeded(lambda: EasyAnimateTransformer3DModel(**(config | overrides)))


def easyanimate_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 6 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 1, 1, 4, 2, 4, 6),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
    }


def easyanimate_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2-VL, and a VAE of stride 2 in time and 4 in space."""
    assert task == "t2v"
    tokenizer = qwen_tokenizer()
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None, "eos_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": TEXT, "patch_size": 4}
    qwen = Qwen2VLConfig(text_config=text, vision_config=vision)
    vae: dict[str, Any] = {
        "latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 2),
        "up_block_types": ("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 2),
    }  # fmt: skip
    return EasyAnimatePipeline(
        vae=seeded(lambda: AutoencoderKLMagvit(**vae)).bfloat16(),
        text_encoder=seeded(lambda: Qwen2VLForConditionalGeneration(qwen)).bfloat16(),
        tokenizer=tokenizer,
        transformer=easyanimate().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


TINY = {
    "EasyAnimateTransformer3DModel": Tiny(easyanimate, easyanimate_inputs, easyanimate_pipeline, (16, 32), 5),
}
