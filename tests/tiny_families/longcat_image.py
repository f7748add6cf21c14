"""LongCat-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)

from tiny_families.parts import (
    TEXT,
    VISION_IDS,
    Native,
    Tiny,
    image,
    image_vae,
    normal,
    qwen2_5_vl,
    qwen_tokenizer,
    qwen_vision_processor,
    seeded,
)


def longcat_image(**overrides: Any) -> LongCatImageTransformer2DModel:
    """Two blocks of each list, d=160, so that a single block's proj_out has K=800."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 5,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (8, 12, 12),
        "pooled_projection_dim": TEXT,
    }
    return seeded(lambda: LongCatImageTransformer2DModel(**(config | overrides)))


def longcat_image_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": normal(model, 31, 1, 16, 16),
        "encoder_hidden_states": normal(model, 32, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def longcat_image_pipeline(task: str) -> DiffusionPipeline:
    """Qwen2.5-VL; a VAE of stride 2, with 16 channels, as the pipeline has them. In the place of Qwen2-VL's processor, which
    needs torchvision, is the tokenizer: the pipeline has nothing but text for it."""
    assert task == "t2i"
    return LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(latent_channels=16),
        text_encoder=qwen2_5_vl(),
        tokenizer=qwen_tokenizer(),
        text_processor=qwen_tokenizer(),
        transformer=longcat_image(in_channels=64).bfloat16(),
    )


def longcat_image_edit_pipeline() -> DiffusionPipeline:
    """The same, of images of a megapixel, as the pipeline makes all of them: so the VAE's stride is 64."""
    processor = qwen_vision_processor(14)
    parts = longcat_image_pipeline("t2i").components | {
        "vae": image_vae(7, latent_channels=16, layers_per_block=0), "text_encoder": qwen2_5_vl(**VISION_IDS),
        "tokenizer": processor.tokenizer, "text_processor": processor
    }  # fmt: skip
    return LongCatImageEditPipeline(**parts)


def edit() -> dict[str, Any]:
    return {
        "image": image(0), "prompt": "a blue seven", "num_inference_steps": 2, "guidance_scale": 2.0,
        "output_type": "np",
    }  # fmt: skip


NATIVE = {"LongCatImageEditPipeline": Native(longcat_image_edit_pipeline, edit, output="images")}
TINY = {
    "LongCatImageTransformer2DModel": Tiny(longcat_image, longcat_image_inputs, longcat_image_pipeline, native=NATIVE),
}
