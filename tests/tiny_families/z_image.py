"""Z-Image at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Model

from tiny_families.parts import TEXT, Tiny, image_vae, normal, qwen3, qwen_tokenizer, seeded


def z_image(**overrides: Any) -> ZImageTransformer2DModel:
    """Two blocks and one of each refiner, d=288, so that the FFN's second linear has K=768."""
    config = {
        "in_channels": 4,
        "dim": 288,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 9,
        "n_kv_heads": 9,
        "cap_feat_dim": TEXT,
        "axes_dims": [8, 12, 12],
        "axes_lens": [128, 16, 16],
    }
    return seeded(lambda: ZImageTransformer2DModel(**(config | overrides)))


def z_image_inputs(model: Any) -> dict[str, Any]:
    """A list of one image of 4 x 4 tokens, and of its 6 tokens of text."""
    return {
        "x": [normal(model, 17, 4, 1, 8, 8)],
        "t": torch.tensor([0.3]),
        "cap_feats": [normal(model, 18, 6, TEXT)],
    }


def z_image_pipeline(task: str) -> DiffusionPipeline:
    """Qwen3, a VAE of stride 2."""
    assert task == "t2i"
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=qwen3(Qwen3Model, 2),
        tokenizer=qwen_tokenizer(),
        transformer=z_image().bfloat16(),
    )


TINY = {"ZImageTransformer2DModel": Tiny(z_image, z_image_inputs, z_image_pipeline)}
