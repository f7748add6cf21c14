"""FLUX.1 at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from tiny_families.parts import TEXT, Native, Tiny, clip_tokenizer, image, image_vae, normal, seeded, t5, t5_tokenizer


def flux(**overrides: Any) -> FluxTransformer2DModel:
    """Two blocks of each list, d=128, so that a single block's proj_out has K=640."""
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": TEXT,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 12, 12),
    }
    return seeded(lambda: FluxTransformer2DModel(**(config | overrides)))


def flux_inputs(model: Any) -> dict[str, Any]:
    """16 tokens of an image and 6 of text."""
    return {
        "hidden_states": normal(model, 1, 1, 16, 16),
        "encoder_hidden_states": normal(model, 2, 1, 6, TEXT),
        "pooled_projections": normal(model, 3, 1, TEXT),
        "timestep": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]) if model.config.guidance_embeds else None,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(6, 3),
    }


def flux_pipeline(task: str) -> DiffusionPipeline:
    """CLIP and T5, a VAE of stride 2."""
    assert task == "t2i"
    tokenizer = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=seeded(lambda: CLIPTextModel(clip)).bfloat16(),
        tokenizer=tokenizer,
        text_encoder_2=t5(64),
        tokenizer_2=t5_tokenizer(),
        transformer=flux().bfloat16(),
    )


def kontext() -> dict[str, Any]:
    """An image to edit, in its own size, which the pipeline leaves as it is by a private argument only."""
    return {
        "prompt": "a blue seven", "image": image(0, 16, 24), "height": 16, "width": 24, "max_area": 16 * 24,
        "num_inference_steps": 2, "guidance_scale": 3.5, "_auto_resize": False, "output_type": "np",
    }  # fmt: skip


NATIVE = {
    "FluxKontextPipeline": Native(
        lambda: FluxKontextPipeline(**flux_pipeline("t2i").components), kontext, output="images"
    )
}
TINY = {"FluxTransformer2DModel": Tiny(flux, flux_inputs, flux_pipeline, (16, 24), native=NATIVE)}
