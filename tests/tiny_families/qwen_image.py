"""Qwen-Image and Qwen-Image 2.1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tiny_families.parts import TEXT, Tiny, normal, qwen2_5_vl, qwen_image_vae, qwen_tokenizer, seeded


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


TINY = {
    "QwenImageTransformer2DModel": Tiny(qwen_image, qwen_image_inputs, qwen_image_pipeline),
    "QwenImage21Transformer2DModel": Tiny(qwen_image21, qwen_image21_inputs),
}
