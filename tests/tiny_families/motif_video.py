"""Motif-Video at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from transformers import (
    SiglipImageProcessor,
    SiglipVisionConfig,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    T5Gemma2TextConfig,
)

import tiny
from tiny_families.parts import TEXT, Tiny, normal, seeded, t5_tokenizer


def motif(**overrides: Any) -> MotifVideoTransformer3DModel:
    """d=160, so that the FFN's second linear has K=640; of the two single blocks the second is of the decoder."""
    config = {
        "in_channels": 33,  # 16 of the latents, 16 of the image's and a mask
        "out_channels": 16,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "text_embed_dim": TEXT,
        "image_embed_dim": TEXT,
        "rope_axes_dim": (8, 12, 12),
    }
    return seeded(lambda: MotifVideoTransformer3DModel(**(config | overrides)))


def motif_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, 6 tokens of text, of which one is padding, and 3 of an image."""
    return {
        "hidden_states": normal(model, 4, 1, 33, 2, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 5, 1, 6, TEXT),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
        "image_embeds": normal(model, 6, 1, 3, TEXT),
    }


def motif_pipeline(task: str) -> DiffusionPipeline:
    """T5Gemma 2, whose SigLIP sees the image, and Wan's tiny VAE."""
    text: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "dropout_rate": 0.0,
    }  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    encoder = T5Gemma2EncoderConfig(text_config=T5Gemma2TextConfig(**text), vision_config=vision, mm_tokens_per_image=4)
    cls = {"t2v": MotifVideoPipeline, "i2v": MotifVideoImage2VideoPipeline}[task]
    return cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=tiny.pipeline().components["vae"].bfloat16(),
        text_encoder=seeded(lambda: T5Gemma2Encoder(encoder)).bfloat16(),
        tokenizer=t5_tokenizer(),
        transformer=motif().bfloat16(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


_MORE = {"enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}
TINY = {"MotifVideoTransformer3DModel": Tiny(motif, motif_inputs, motif_pipeline, (16, 16), 5, _MORE)}
