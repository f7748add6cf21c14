"""Wan Animate and Wan Animate 2 at tiny size."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanAnimate2DistilledModularPipeline,
    WanAnimate2ModularPipeline,
    WanAnimate2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from transformers import CLIPVisionConfig, CLIPVisionModel

import tiny
from tiny_families.parts import TEXT, Native, Tiny, image, normal, seeded, video
from tiny_families.wan_derived import derived, image_parts, inputs, parts

_ANIMATE = {
    "in_channels": 36,
    "latent_channels": 16,
    "image_dim": TEXT,
    "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}

animate = derived(WanAnimateTransformer3DModel, **_ANIMATE)


def animate_inputs(model: Any) -> dict[str, Any]:
    """3 frames of latents, the first of the character's image; a pose for the other two, and 5 frames of a face."""
    return inputs(model) | {
        "hidden_states": normal(model, 8, 1, model.config.in_channels, 3, 8, 8),
        "pose_hidden_states": normal(model, 11, 1, model.config.latent_channels, 2, 8, 8),
        "face_pixel_values": normal(model, 12, 1, 3, 5, 16, 16),
    }


def animate_2(**overrides: Any) -> WanAnimate2Transformer3DModel:
    config: dict[str, Any] = {
        "in_dim": 36, "out_dim": 16, "dim": 64, "num_heads": 2, "ffn_dim": 576, "freq_dim": 64, "num_layers": 2,
        "text_dim": tiny.TEXT_DIM, "text_len": 8,
    }  # fmt: skip
    return seeded(lambda: WanAnimate2Transformer3DModel(**(config | overrides)))


def animate_2_inputs(model: Any) -> dict[str, Any]:
    """The pass over the character: lists of clips. The pass over the video is FlexAttention's, which must be compiled."""
    return {
        "hidden_states": [normal(model, 8, 16, 2, 8, 8)],
        "condition_latents": [normal(model, 9, 20, 2, 8, 8)],
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": [normal(model, 10, 6, tiny.TEXT_DIM)],
        "encoder_hidden_states_image": normal(model, 11, 1, 3, 1280),
        "kv_cache": WanAnimate2KVCache(model.config.num_layers),
        "kv_cache_mode": "extract",
        "seq_len": 2 * 4 * 4,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
    }


def animate_pipeline() -> DiffusionPipeline:
    return WanAnimatePipeline(**parts(transformer=animate().bfloat16(), **image_parts(CLIPVisionModel)))


def animate_call() -> dict[str, Any]:
    """A character, and the pose and the face that it follows through two segments of 5 frames, which share one."""
    return {
        "prompt": "a red seven", "image": image(1), "pose_video": video(2, 9), "face_video": video(3, 9), "height": 16,
        "width": 16, "segment_frame_length": 5, "num_inference_steps": 2,
    }  # fmt: skip


def _animate_2_pipeline(made: Any) -> Any:
    """With Wan's text encoder and VAE, and a CLIP as wide as the transformer counts on, of 7 x 7 patches."""
    pipeline = made(getattr(diffusers, made.default_blocks_name)())
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    encoder = seeded(lambda: CLIPVisionModel(config)).bfloat16()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline.update_components(**parts(transformer=animate_2().bfloat16(), image_encoder=encoder, scheduler=scheduler))
    return pipeline


def animate_2_call() -> dict[str, Any]:
    """A character, and a video that it moves as, through two segments of 5 frames, which share one."""
    return {
        "prompt": "a red seven", "prompt_ref": "a blue three", "image": image(1), "driving_video": video(2, 9),
        "height": 16, "width": 16, "segment_frame_length": 5, "num_inference_steps": 2, "max_sequence_length": 8,
    }  # fmt: skip


TINY = {
    "WanAnimateTransformer3DModel": Tiny(
        animate, animate_inputs, more={"added_kv_proj_dim": 64},
        native={"WanAnimatePipeline": Native(animate_pipeline, animate_call)},
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        animate_2, animate_2_inputs,
        native={
            made.__name__: Native(partial(_animate_2_pipeline, made), animate_2_call, "videos")
            for made in (WanAnimate2ModularPipeline, WanAnimate2DistilledModularPipeline)
        },
    ),
}  # fmt: skip
