"""AuraFlow at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tiny_families.parts import TEXT, Tiny, image_vae, normal, seeded, t5, t5_tokenizer


def auraflow(**overrides: Any) -> AuraFlowTransformer2DModel:
    """Two blocks of each list, d=224, so that the feed-forward's last linear has K=768."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 7,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 224,
        "pos_embed_max_size": 64,
    }
    return seeded(lambda: AuraFlowTransformer2DModel(**(config | overrides)))


def auraflow_inputs(model: Any) -> dict[str, Any]:
    """8 x 8 latents and 6 tokens of text."""
    return {
        "hidden_states": normal(model, 38, 1, 4, 8, 8),
        "encoder_hidden_states": normal(model, 39, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
    }


def auraflow_pipeline(task: str) -> DiffusionPipeline:
    """T5 and a VAE of stride 2."""
    assert task == "t2i"
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(64),
        vae=image_vae(),
        transformer=auraflow().bfloat16(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


TINY = {"AuraFlowTransformer2DModel": Tiny(auraflow, auraflow_inputs, auraflow_pipeline, (16, 24))}
