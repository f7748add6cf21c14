"""Cosmos 3 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, DiffusionPipeline, UniPCMultistepScheduler
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosSafetyChecker

from tiny_families.cosmos import Checker, follow, wan_vae
from tiny_families.parts import Native, Tiny, normal, qwen_tokenizer, seeded


def cosmos3(**overrides: Any) -> Cosmos3OmniTransformer:
    """Two blocks, d=128, MLPs of 640 channels, so that their second linears have K=640."""
    config: dict[str, Any] = {
        "hidden_size": 128,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 640,
        "num_hidden_layers": 2,
        "latent_channel": 4,
        "patch_latent_dim": 16,
        "rope_axes_dim": (6, 5, 5),
        "vocab_size": 64,
    }
    return seeded(lambda: Cosmos3OmniTransformer(**(config | overrides)))


def cosmos3_inputs(model: Any) -> dict[str, Any]:
    """One sequence: 6 tokens of text, then 2 frames of 2 x 3 patches, both of noise."""
    text, frames, height, width = 6, 2, 2, 3
    patches = frames * height * width
    places = torch.arange(text, text + patches)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T
    return {
        "input_ids": torch.arange(1, text + 1),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, text), grid + text], dim=1),
        "und_len": text,
        "sequence_length": text + patches,
        "vision_tokens": [normal(model, 1, 1, 4, frames, 2 * height, 2 * width)],
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_timesteps": torch.full((patches,), 700.0),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


class OmniChecker(Checker, CosmosSafetyChecker):
    """Of the class that this pipeline knows."""


def cosmos3_pipeline(_: str) -> DiffusionPipeline:
    """Its transformer reads the prompt's tokens itself."""
    return Cosmos3OmniPipeline(
        transformer=cosmos3(vocab_size=272).bfloat16(),
        text_tokenizer=qwen_tokenizer(),
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        safety_checker=OmniChecker(),
    )


TINY = {
    "Cosmos3OmniTransformer": Tiny(
        cosmos3,
        cosmos3_inputs,
        cosmos3_pipeline,
        (32, 48),
        9,
        parts={"safety_checker": OmniChecker()},
        native={"Cosmos3OmniPipeline": Native(lambda: cosmos3_pipeline("t2v"), follow, "video")},
    )
}
