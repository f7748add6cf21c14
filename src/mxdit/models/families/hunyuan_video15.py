"""HunyuanVideo 1.5 (T2V and I2V, 480p and 720p): one transformer, two text encoders, guidance in a component of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mxdit.models.spec import MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Latents are 1/16 of the video's height and width, and a patch is 1 x p x p of them."""
    stride = int(vae.get("spatial_compression_ratio") or 16)
    return Geometry(
        multiple=stride * int(config["patch_size"]),
        temporal=int(vae.get("temporal_compression_ratio") or 4),
        of_image=partial(_of_image, stride, int(config["target_size"])),
    )


def _of_image(stride: int, target: int, height: int, width: int) -> tuple[int, int]:
    """The size that the I2V pipeline makes of an image: of the model's area, and of the nearest aspect it was trained on."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=stride)
    return processor.calculate_default_height_width(height=height, width=width, target_size=target)


_CALL = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guider.guidance_scale",
}

# Source of the figures: the defaults of diffusers' pipelines, which choose (480, 848) for a target of 640 and (720, 1280)
# for one of 960 themselves; 24 frames a second are those of diffusers' I2V example. Guidance and flow shift differ between
# the published models, distilled ones among them, and each directory has its own in guider/ and scheduler/.
_720P = {"target_size": 960}
_PRESETS = (
    Preset("HunyuanVideo-1.5-720p", "t2v", (720, 1280), 121, 24, 50, config=_720P),
    Preset("HunyuanVideo-1.5-720p", "i2v", (720, 1280), 121, 24, 50, config=_720P),
    Preset("HunyuanVideo-1.5-480p", "t2v", (480, 848), 121, 24, 50),
    Preset("HunyuanVideo-1.5-480p", "i2v", (480, 848), 121, 24, 50),
)


HUNYUAN_VIDEO_15 = ModelSpec(
    title="HunyuanVideo 1.5",
    transformer="HunyuanVideo15Transformer3DModel",
    # Not the text's refiner (context_embedder.token_refiner.refiner_blocks): two small blocks that see the text alone,
    # and whose output every block takes.
    blocks=("transformer_blocks",),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear"), MODULATION),
    pipelines={
        "HunyuanVideo15Pipeline": PipelineSpec("t2v", {**_CALL, "height": "height", "width": "width"}),
        "HunyuanVideo15ImageToVideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}),
    },
    needed=("num_layers", "patch_size", "target_size"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the releases'.
    published=(Published("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"),),
)

SPECS = (HUNYUAN_VIDEO_15,)
