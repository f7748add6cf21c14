"""What has Wan's blocks, at tiny size: Wan's own sizes, and what each model adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    HeliosTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

import tiny
from tiny_families.parts import TEXT, Native, Tiny, image, normal, seeded, video

_SIZES = {  # d=64, and an FFN whose second linear has K=576
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": tiny.TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 576,
    "num_layers": 2,
}
_IMAGE = {"image_dim": TEXT, "added_kv_proj_dim": 64}
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


def derived(cls: Any, **own: Any) -> Callable[..., Any]:
    """Makes one of a class that takes Wan's config, with keys of its own."""
    return lambda **overrides: seeded(lambda: cls(**(_SIZES | own | overrides)))


vace = derived(WanVACETransformer3DModel, vace_layers=(0, 1))
animate = derived(WanAnimateTransformer3DModel, **_ANIMATE)
skyreels = derived(SkyReelsV2Transformer3DModel)
helios = derived(HeliosTransformer3DModel, rope_dim=(12, 10, 10))
anyflow = derived(AnyFlowTransformer3DModel)
anyflow_far = derived(AnyFlowFARTransformer3DModel)
chronoedit = derived(ChronoEditTransformer3DModel, in_channels=36, **_IMAGE)


def inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, 512 tokens of text, as its attention counts on, and 3 of an image where it takes one."""
    width = model.config.image_dim
    return {
        "hidden_states": normal(model, 8, 1, model.config.in_channels, 2, 8, 8),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": normal(model, 9, 1, 512, tiny.TEXT_DIM),
        "encoder_hidden_states_image": normal(model, 10, 1, 3, width) if width else None,
    }


def vace_inputs(model: Any) -> dict[str, Any]:
    """Latents of what is kept and what is new of a video to follow, and a mask of 8 x 8 pixels to each."""
    return inputs(model) | {"control_hidden_states": normal(model, 11, 1, model.config.vace_in_channels, 2, 8, 8)}


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


def anyflow_inputs(model: Any) -> dict[str, Any]:
    """2 frames of 8 x 8 latents, frames first, that go from one timestep to another."""
    return {
        "hidden_states": normal(model, 8, 1, 2, 16, 8, 8),
        "timestep": torch.full((1, 2), 700.0),
        "r_timestep": torch.full((1, 2), 400.0),
        "encoder_hidden_states": normal(model, 9, 1, 6, tiny.TEXT_DIM),
    }


def anyflow_far_inputs(model: Any) -> dict[str, Any]:
    """The same, in chunks of a frame."""
    return anyflow_inputs(model) | {"chunk_partition": [1, 1]}


def parts(**own: Any) -> dict[str, Any]:
    """The text encoder, VAE and scheduler of Wan's tiny pipeline, and parts of its own."""
    shared = tiny.pipeline().components.items()
    return {name: part for name, part in shared if not name.startswith("transformer")} | own


def image_parts(cls: Any) -> dict[str, Any]:
    """A CLIP that sees 4 patches of an image."""
    config = CLIPVisionConfig(
        hidden_size=TEXT, intermediate_size=64, projection_dim=TEXT, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    return {
        "image_encoder": seeded(lambda: cls(config)).bfloat16(),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }


def vace_pipeline(task: str) -> DiffusionPipeline:
    assert task == "t2v"
    return WanVACEPipeline(**parts(transformer=vace().bfloat16()))


def vace_call() -> dict[str, Any]:
    """A video to follow, of which the second half of each frame is made anew, and an image of what is to be in it."""
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    return {
        "prompt": "a red seven", "video": video(1, 5), "mask": [mask] * 5, "reference_images": [image(2)], "height": 16,
        "width": 16, "num_frames": 5, "num_inference_steps": 2,
    }  # fmt: skip


def animate_pipeline() -> DiffusionPipeline:
    return WanAnimatePipeline(**parts(transformer=animate().bfloat16(), **image_parts(CLIPVisionModel)))


def animate_call() -> dict[str, Any]:
    """A character, and the pose and the face that it follows through two segments of 5 frames, which share one."""
    return {
        "prompt": "a red seven", "image": image(1), "pose_video": video(2, 9), "face_video": video(3, 9), "height": 16,
        "width": 16, "segment_frame_length": 5, "num_inference_steps": 2,
    }  # fmt: skip


def skyreels_pipeline(task: str) -> DiffusionPipeline:
    if task == "t2v":
        return SkyReelsV2Pipeline(**parts(transformer=skyreels().bfloat16()))
    transformer = skyreels(in_channels=36, **_IMAGE).bfloat16()
    return SkyReelsV2ImageToVideoPipeline(
        **parts(transformer=transformer, **image_parts(CLIPVisionModelWithProjection))
    )


def chronoedit_pipeline(task: str) -> DiffusionPipeline:
    assert task == "i2v"
    return ChronoEditPipeline(**parts(transformer=chronoedit().bfloat16(), **image_parts(CLIPVisionModel)))


def anyflow_pipeline(task: str) -> DiffusionPipeline:
    assert task == "t2v"
    return AnyFlowPipeline(
        **parts(transformer=anyflow().bfloat16(), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0))
    )


TINY = {
    "WanVACETransformer3DModel": Tiny(
        vace, vace_inputs, vace_pipeline, (16, 16), 5, _IMAGE,
        native={"WanVACEPipeline": Native(lambda: vace_pipeline("t2v"), vace_call)},
    ),
    "WanAnimateTransformer3DModel": Tiny(
        animate, animate_inputs, more={"added_kv_proj_dim": 64},
        native={"WanAnimatePipeline": Native(animate_pipeline, animate_call)},
    ),
    "WanAnimate2Transformer3DModel": Tiny(animate_2, animate_2_inputs),
    "SkyReelsV2Transformer3DModel": Tiny(skyreels, inputs, skyreels_pipeline, (16, 16), 5, _IMAGE),
    "ChronoEditTransformer3DModel": Tiny(chronoedit, inputs, chronoedit_pipeline, (16, 16)),
    "HeliosTransformer3DModel": Tiny(helios, helios_inputs),
    "AnyFlowTransformer3DModel": Tiny(anyflow, anyflow_inputs, anyflow_pipeline, (16, 16), 5),
    "AnyFlowFARTransformer3DModel": Tiny(anyflow_far, anyflow_far_inputs),
}  # fmt: skip
