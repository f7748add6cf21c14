"""Helios at tiny size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
)

import tiny
from tiny_families.parts import Native, Tiny, image, normal
from tiny_families.wan_derived import derived, parts

helios = derived(HeliosTransformer3DModel, rope_dim=(12, 10, 10))


def helios_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, and those before: 2 as they are, 2 at half and 4 at a quarter of the size."""
    frames = torch.arange(10).unsqueeze(0)
    return {
        "hidden_states": normal(model, 8, 1, 16, 2, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 9, 1, 6, tiny.TEXT_DIM),
        "indices_hidden_states": frames[:, 8:],
        "latents_history_long": normal(model, 11, 1, 16, 4, 8, 8),
        "indices_latents_history_long": frames[:, :4],
        "latents_history_mid": normal(model, 12, 1, 16, 2, 8, 8),
        "indices_latents_history_mid": frames[:, 4:6],
        "latents_history_short": normal(model, 13, 1, 16, 2, 8, 8),
        "indices_latents_history_short": frames[:, 6:8],
    }


def helios_pipeline() -> DiffusionPipeline:
    return HeliosPipeline(
        **parts(transformer=helios().bfloat16(), scheduler=HeliosScheduler(stages=1, stage_range=[0, 1]))
    )


def helios_call() -> dict[str, Any]:
    """An image, and two sections of two frames of latents after it; the second one sees the first."""
    return {
        "prompt": "a red seven", "negative_prompt": "blue", "image": image(1), "height": 16, "width": 16,
        "num_frames": 10, "history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2, "num_inference_steps": 2,
    }  # fmt: skip


def pyramid_pipeline() -> DiffusionPipeline:
    """As it was distilled, with two stages: half the size and the whole.

    With gamma at 1/3, its default, the covariance of the noise between stages is singular, and LAPACK does not factor it.
    """
    scheduler = HeliosDMDScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    return HeliosPyramidPipeline(**parts(transformer=helios().bfloat16(), scheduler=scheduler), is_distilled=True)


def pyramid_call() -> dict[str, Any]:
    """One section, with a step in each stage."""
    return {
        "prompt": "a red seven", "height": 32, "width": 32, "num_frames": 5, "history_sizes": [4, 2, 1],
        "num_latent_frames_per_chunk": 2, "pyramid_num_inference_steps_list": [1, 1], "guidance_scale": 1.0,
    }  # fmt: skip


TINY = {
    "HeliosTransformer3DModel": Tiny(
        helios, helios_inputs,
        native={
            "HeliosPipeline": Native(helios_pipeline, helios_call),
            "HeliosPyramidPipeline": Native(pyramid_pipeline, pyramid_call),
        },
    )
}  # fmt: skip
