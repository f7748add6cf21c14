"""What has Wan's blocks, at tiny size: Wan's own sizes, and what each model adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
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
IMAGE = {"image_dim": TEXT, "added_kv_proj_dim": 64}


def derived(cls: Any, **own: Any) -> Callable[..., Any]:
    """Makes one of a class that takes Wan's config, with keys of its own."""
    return lambda **overrides: seeded(lambda: cls(**(_SIZES | own | overrides)))


vace = derived(WanVACETransformer3DModel, vace_layers=(0, 1))
skyreels = derived(SkyReelsV2Transformer3DModel)
anyflow = derived(AnyFlowTransformer3DModel)
anyflow_far = derived(AnyFlowFARTransformer3DModel)
chronoedit = derived(ChronoEditTransformer3DModel, in_channels=36, **IMAGE)


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


def skyreels_pipeline(task: str) -> DiffusionPipeline:
    if task == "t2v":
        return SkyReelsV2Pipeline(**parts(transformer=skyreels().bfloat16()))
    transformer = skyreels(in_channels=36, **IMAGE).bfloat16()
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


def anyflow_far_pipeline() -> DiffusionPipeline:
    return AnyFlowFARPipeline(
        **parts(transformer=anyflow_far().bfloat16(), scheduler=FlowMapEulerDiscreteScheduler(shift=5.0))
    )


def anyflow_far_call() -> dict[str, Any]:
    """A frame is given, and two chunks are made after it, of one and of two frames of latents."""
    first = torch.rand(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {
        "prompt": "a red seven", "video": first, "height": 16, "width": 16, "num_frames": 13,
        "chunk_partition": [1, 1, 2], "num_inference_steps": 2,
    }  # fmt: skip


TINY = {
    "WanVACETransformer3DModel": Tiny(
        vace, vace_inputs, vace_pipeline, (16, 16), 5, IMAGE,
        native={"WanVACEPipeline": Native(lambda: vace_pipeline("t2v"), vace_call)},
    ),
    "SkyReelsV2Transformer3DModel": Tiny(skyreels, inputs, skyreels_pipeline, (16, 16), 5, IMAGE),
    "ChronoEditTransformer3DModel": Tiny(chronoedit, inputs, chronoedit_pipeline, (16, 16)),
    "AnyFlowTransformer3DModel": Tiny(anyflow, anyflow_inputs, anyflow_pipeline, (16, 16), 5),
    "AnyFlowFARTransformer3DModel": Tiny(
        anyflow_far, anyflow_far_inputs, native={"AnyFlowFARPipeline": Native(anyflow_far_pipeline, anyflow_far_call)}
    ),
}  # fmt: skip
