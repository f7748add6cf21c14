"""HunyuanVideo 1.5 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tiny_families.parts import TEXT, Tiny, normal, qwen_tokenizer, seeded, t5


def hunyuan(**overrides: Any) -> HunyuanVideo15Transformer3DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640; one block of the text's refiner."""
    config = {
        "in_channels": 9,  # 4 of the latents, 4 of the image's and a mask
        "out_channels": 4,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT,
        "text_embed_2_dim": TEXT,
        "image_embed_dim": TEXT,
        "rope_axes_dim": (8, 12, 12),
        "target_size": 32,
    }
    return seeded(lambda: HunyuanVideo15Transformer3DModel(**(config | overrides)))


def hunyuan_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 4 x 4 latents, 6 tokens of text, 4 of glyphs (of which one is padding) and 3 of an image."""
    return {
        "hidden_states": normal(model, 4, 1, 9, 2, 4, 4),
        "timestep": torch.tensor([700.0], dtype=model.dtype),  # as its pipelines cast it
        "encoder_hidden_states": normal(model, 5, 1, 6, TEXT),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.long),
        "encoder_hidden_states_2": normal(model, 6, 1, 4, TEXT),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
        "image_embeds": normal(model, 7, 1, 3, TEXT),
    }


def hunyuan_pipeline(task: str) -> DiffusionPipeline:
    """The text half of Qwen2.5-VL, ByT5, for I2V SigLIP, and a VAE of stride 4 in time and space."""
    tokenizer: Any = qwen_tokenizer()
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    )  # fmt: skip
    vae: dict[str, Any] = {
        "latent_channels": 4, "block_out_channels": (8, 8, 8), "layers_per_block": 1, "spatial_compression_ratio": 4,
    }  # fmt: skip
    bytes_of = ByT5Tokenizer()
    parts: dict[str, Any] = {
        "text_encoder": seeded(lambda: Qwen2_5_VLTextModel(qwen)).bfloat16(),
        "tokenizer": tokenizer,
        "transformer": hunyuan(task_type=task).bfloat16(),
        "vae": seeded(lambda: AutoencoderKLHunyuanVideo15(**vae)).bfloat16(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": t5(len(bytes_of)),
        "tokenizer_2": bytes_of,
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if task == "t2v":
        return HunyuanVideo15Pipeline(**parts)
    siglip = SiglipVisionConfig(
        hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **parts,
        image_encoder=seeded(lambda: SiglipVisionModel(siglip)).bfloat16(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )


TINY = {"HunyuanVideo15Transformer3DModel": Tiny(hunyuan, hunyuan_inputs, hunyuan_pipeline, (16, 24), 5)}
