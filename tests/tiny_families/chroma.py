"""Chroma at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)

from tiny_families.parts import TEXT, Tiny, image_vae, normal, seeded, t5, t5_tokenizer


def chroma(**overrides: Any) -> ChromaTransformer2DModel:
    """Two blocks of each list, d=128, so that a single block's proj_out has K=640."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": (8, 12, 12),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    return seeded(lambda: ChromaTransformer2DModel(**(config | overrides)))


def chroma_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": normal(model, 31, 1, 16, 16),
        "encoder_hidden_states": normal(model, 32, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def chroma_pipeline(task: str) -> DiffusionPipeline:
    """T5 and a VAE of stride 2."""
    assert task == "t2i"
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=t5(64),
        tokenizer=t5_tokenizer(),
        transformer=chroma().bfloat16(),
    )


TINY = {"ChromaTransformer2DModel": Tiny(chroma, chroma_inputs, chroma_pipeline, (16, 24))}
