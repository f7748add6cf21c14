"""LTX-Video (2B and 13B): one transformer, whose modulations are tables in its blocks and one linear outside of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE patches the video and halves it in some of its stages, and the pipelines refuse what is no multiple of 32."""
    stages = sum(vae.get("spatio_temporal_scaling") or (True, True, True, False))
    spatial = vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * 2**stages
    temporal = vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * 2**stages
    return Geometry(multiple=lcm(32, spatial * int(config["patch_size"])), temporal=temporal)


_CALL = {**VIDEO_CALL, "fps": "frame_rate"}

# Source of the figures: the examples and defaults of diffusers' pipelines.
_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
_PRESETS = (
    Preset("LTX-Video", "t2v", (480, 704), 161, 25, 50, 3.0, negative_prompt=_NEGATIVE),
    Preset("LTX-Video", "i2v", (480, 704), 161, 25, 50, 3.0, negative_prompt=_NEGATIVE),
)


LTX = ModelSpec(
    title="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # of the text
    ),
    pipelines={
        "LTXPipeline": PipelineSpec("t2v", _CALL),
        "LTXImageToVideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}),
    },
    hosts=(
        "LTXConditionPipeline",  # images and videos, each at a frame of its own
        "LTXI2VLongMultiPromptPipeline",  # one prompt for each part of a long clip
    ),
    needed=("patch_size",),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are those of the 2B; Lightricks' LTX-Video-Trainer has the config of the 13B.
    published=(
        Published("Lightricks/LTX-Video"),
        Published(
            "Lightricks/LTX-Video-0.9.7-dev", {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
        ),
    ),
    # Source: examples/diffusers/quantization/utils.py of NVIDIA's Model Optimizer.
    recipes={
        "Model Optimizer": "the first and last three of 48 blocks; with mxdit that is a choice (`num_bf16_fallback_layers`)"
    },
)

SPECS = (LTX,)
