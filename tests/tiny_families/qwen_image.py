"""Qwen-Image and Qwen-Image 2.1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen3VLForConditionalGeneration

from tiny_families.parts import (
    TEXT,
    VISION_IDS,
    Native,
    Tiny,
    image,
    normal,
    qwen2_5_vl,
    qwen3_vl,
    qwen_image_vae,
    qwen_tokenizer,
    qwen_vision_processor,
    seeded,
)


def qwen_image(**overrides: Any) -> QwenImageTransformer2DModel:
    """Two blocks, d=160, so that the FFN's second linear has K=640."""
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (8, 12, 12),
    }
    return seeded(lambda: QwenImageTransformer2DModel(**(config | overrides)))


def qwen_image_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text, of which one is padding."""
    return {
        "hidden_states": normal(model, 13, 1, 16, 16),
        "encoder_hidden_states": normal(model, 14, 1, 6, TEXT),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 4, 4)]],
    }


def qwen_image_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2.5-VL, a VAE of stride 2."""
    assert task == "t2i"
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=qwen_image_vae(),
        text_encoder=qwen2_5_vl(),
        tokenizer=qwen_tokenizer(),
        transformer=qwen_image().bfloat16(),
    )


def qwen_image_edit_pipeline() -> DiffusionPipeline:
    """The same, of images of a megapixel, as the pipeline makes all of them: so the VAE's stride is 64."""
    vae: dict[str, Any] = {
        "base_dim": 4, "z_dim": 4, "dim_mult": [1] * 7, "num_res_blocks": 0, "temperal_downsample": [False] * 6,
        "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    }  # fmt: skip
    processor = qwen_vision_processor(14)
    parts = qwen_image_pipeline("t2i").components | {
        "vae": seeded(lambda: AutoencoderKLQwenImage(**vae)).bfloat16(),
        "text_encoder": qwen2_5_vl(**VISION_IDS),
        "tokenizer": processor.tokenizer,
        "processor": processor,
    }
    return QwenImageEditPipeline(**parts)


def qwen_image_edit() -> dict[str, Any]:
    return {
        "image": image(0), "prompt": "a blue seven", "negative_prompt": "red", "true_cfg_scale": 2.0,
        "num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip


def qwen_image21(**overrides: Any) -> QwenImage21Transformer2DModel:
    """Two blocks, d=160, so that the FFN's last linear has K=640."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "context_in_dim": TEXT,
        "mlp_ratio": 4,
        "axes_dims_rope": (8, 12, 12),
    }
    return seeded(lambda: QwenImage21Transformer2DModel(**(config | overrides)))


def qwen_image21_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image, in 4 slots of the language model, after 6 of text."""
    return {
        "hidden_states": normal(model, 15, 1, 16, 4),
        "encoder_hidden_states": normal(model, 16, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
    }


def qwen_image21_pipeline() -> DiffusionPipeline:
    """Qwen3-VL, a VAE of stride 16 with 4 channels."""
    vae: dict[str, Any] = {
        "base_dim": 4, "decoder_base_dim": 4, "z_dim": 4, "dim_mult": [1] * 5, "num_res_blocks": 1,
        "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4,
    }  # fmt: skip
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=seeded(lambda: AutoencoderKLQwenImage21(**vae)).bfloat16(),
        text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, 2),
        processor=qwen_vision_processor(16),
        transformer=qwen_image21().bfloat16(),
    )


def edit() -> dict[str, Any]:
    """An image to follow, guidance, and keys and values kept from the first step."""
    return {
        "prompt": "a blue seven", "negative_prompt": "red", "image": image(0, 64, 64), "true_cfg_scale": 3.0,
        "output_resolution": 64, "num_inference_steps": 3, "output_type": "np",
    }  # fmt: skip


NATIVE = {"QwenImageEditPipeline": Native(qwen_image_edit_pipeline, qwen_image_edit, output="images")}
NATIVE21 = {"QwenImage21Pipeline": Native(qwen_image21_pipeline, edit, output="images")}
TINY = {
    "QwenImageTransformer2DModel": Tiny(qwen_image, qwen_image_inputs, qwen_image_pipeline, native=NATIVE),
    "QwenImage21Transformer2DModel": Tiny(qwen_image21, qwen_image21_inputs, native=NATIVE21),
}
