"""HunyuanImage 2.1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer

from tiny_families.parts import TEXT, Tiny, normal, qwen2_5_vl, qwen_tokenizer, seeded, t5


def hunyuan_image(**overrides: Any) -> HunyuanImageTransformer2DModel:
    """Two blocks of each list, d=160, so that the FFN's second linear has K=640; one block of the text's refiner."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": TEXT,
        "rope_axes_dim": (16, 16),
    }
    return seeded(lambda: HunyuanImageTransformer2DModel(**(config | overrides)))


def hunyuan_image_inputs(model: Any) -> dict[str, Any]:
    """4 x 4 latents, 6 tokens of text, and 4 of glyphs (of which one is padding)."""
    return {
        "hidden_states": normal(model, 19, 1, 4, 4, 4),
        "timestep": torch.tensor([700.0], dtype=model.dtype),  # as its pipeline casts it
        "encoder_hidden_states": normal(model, 20, 1, 6, TEXT),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "encoder_hidden_states_2": normal(model, 21, 1, 4, TEXT),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
    }


def hunyuan_image_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2.5-VL, ByT5, a VAE of stride 2."""
    assert task == "t2i"
    vae: dict[str, Any] = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
        "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.75,
    }  # fmt: skip
    bytes_of = ByT5Tokenizer()
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=seeded(lambda: AutoencoderKLHunyuanImage(**vae)).bfloat16(),
        text_encoder=qwen2_5_vl(),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=t5(len(bytes_of)),
        tokenizer_2=bytes_of,
        transformer=hunyuan_image().bfloat16(),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )


TINY = {"HunyuanImageTransformer2DModel": Tiny(hunyuan_image, hunyuan_image_inputs, hunyuan_image_pipeline)}
