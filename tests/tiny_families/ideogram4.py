"""Ideogram 4 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR
from transformers import Qwen3VLModel

from tiny_families.flux2 import flux2_vae
from tiny_families.parts import TEXT, Native, Tiny, normal, qwen3_vl, qwen_tokenizer, seeded

TAPS = 13  # layers of the text encoder that the pipeline takes


def ideogram4(seed: int = 7, **overrides: Any) -> Ideogram4Transformer2DModel:
    """Two blocks, whose FFN's last linear has K=640."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "intermediate_size": 640,
        "adaln_dim": 32,
        "llm_features_dim": 2 * TEXT,
        "mrope_section": (6, 5, 5),
    }
    return seeded(lambda: Ideogram4Transformer2DModel(**(config | overrides)), seed)


def ideogram4_inputs(model: Any) -> dict[str, Any]:
    """6 tokens of text, then 16 of an image, in one sequence."""
    text, image = torch.arange(6)[:, None].expand(6, 3), torch.cartesian_prod(torch.zeros(1), *[torch.arange(4.0)] * 2)
    return {
        "hidden_states": normal(model, 35, 1, 22, 16),
        "timestep": torch.tensor([0.3], dtype=model.dtype),  # as its pipeline casts it
        "encoder_hidden_states": normal(model, 36, 1, 22, 2 * TEXT),
        "position_ids": torch.cat([text, image.long()])[None],
        "segment_ids": torch.zeros(1, 22, dtype=torch.long),
        "indicator": torch.tensor([[LLM_TOKEN_INDICATOR] * 6 + [OUTPUT_IMAGE_INDICATOR] * 16]),
    }


def ideogram4_pipeline() -> DiffusionPipeline:
    """Qwen3-VL of 36 layers, for the pipeline takes some of them by their numbers; two transformers; a VAE of stride 2."""
    features = {"llm_features_dim": TAPS * TEXT}
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=qwen3_vl(Qwen3VLModel, 36),
        tokenizer=qwen_tokenizer(),
        transformer=ideogram4(**features).bfloat16(),
        unconditional_transformer=ideogram4(8, **features).bfloat16(),
    )


def call() -> dict[str, Any]:
    """With a guidance of its own at each step."""
    return {
        "prompt": "a red seven", "height": 16, "width": 24, "num_inference_steps": 2, "guidance_schedule": [4.0, 2.0],
        "max_sequence_length": 64, "output_type": "np",
    }  # fmt: skip


NATIVE = {"Ideogram4Pipeline": Native(ideogram4_pipeline, call, output="images")}
TINY = {"Ideogram4Transformer2DModel": Tiny(ideogram4, ideogram4_inputs, native=NATIVE)}
