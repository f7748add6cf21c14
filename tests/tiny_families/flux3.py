"""FLUX.3 at tiny size."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import Flux3DistilledModularPipeline, Flux3ModularPipeline, Flux3Transformer2DModel
from transformers import Qwen3VLForConditionalGeneration

from tiny_families.flux2 import flux2_vae
from tiny_families.parts import TEXT, Native, Tiny, image, normal, qwen3_vl, qwen_processor, seeded


def flux3(**overrides: Any) -> Flux3Transformer2DModel:
    """One block of each list for one kind of token and two for all, d=192, so that ff.linear_out has K=576."""
    config = {
        "in_channels": 16,
        "cond_in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 6,
        "joint_attention_dim": TEXT,
        "timestep_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return seeded(lambda: Flux3Transformer2DModel(**(config | overrides)))


def flux3_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image, 4 of an image to follow, and 6 of text."""
    return {
        "hidden_states": normal(model, 33, 1, 16, 16),
        "encoder_hidden_states": normal(model, 34, 1, 6, TEXT),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), torch.zeros(1)),
        "txt_ids": torch.cartesian_prod(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.arange(6.0)),
        "image_cond_hidden_states": normal(model, 35, 1, 4, 16),
        "image_cond_ids": torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(2.0), torch.zeros(1)),
    }


def _pipeline(made: Any, **config: Any) -> Any:
    """Of blocks without the one that has another model rewrite the prompt; a text encoder of two layers, a VAE of stride 2."""
    blocks = getattr(diffusers, made.default_blocks_name)()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = made(blocks)
    pipeline.update_components(
        transformer=flux3(**config).bfloat16(),
        vae=flux2_vae(),
        text_encoder=qwen3_vl(Qwen3VLForConditionalGeneration, 2),
        tokenizer=qwen_processor(),
    )
    return pipeline


def flux3_pipeline() -> Any:
    return _pipeline(Flux3ModularPipeline, joint_attention_dim=2 * TEXT)


def distilled_pipeline() -> Any:
    """Of a transformer that goes from any timestep to any other."""
    return _pipeline(Flux3DistilledModularPipeline, joint_attention_dim=2 * TEXT, flow_map=True)


def call() -> dict[str, Any]:
    """Two images to follow."""
    return {
        "prompt": "a red seven", "image": [image(1), image(2)], "text_encoder_out_layers": (1, 2), "height": 16,
        "width": 24, "num_inference_steps": 2, "output_type": "np",
    }  # fmt: skip


TINY = {
    "Flux3Transformer2DModel": Tiny(
        flux3, flux3_inputs,
        native={
            "Flux3ModularPipeline": Native(flux3_pipeline, call, "images"),
            "Flux3DistilledModularPipeline": Native(distilled_pipeline, call, "images"),
        },
    )
}  # fmt: skip
