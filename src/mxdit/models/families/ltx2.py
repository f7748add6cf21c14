"""LTX-2 (2.0 to 2.5): one transformer of two streams, video and sound, that attend to each other in every block."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """What the VAE's config says of its strides, which are 8 x 32 x 32; the pipelines refuse what is no multiple of 32."""
    spatial = int(vae.get("spatial_compression_ratio") or 32)
    return Geometry(
        multiple=lcm(32, spatial * int(config["patch_size"])), temporal=int(vae.get("temporal_compression_ratio") or 8)
    )


_CALL = {**VIDEO_CALL, "fps": "frame_rate"}  # guidance is the video's; the sound has one of its own

# Source of the figures: the examples of diffusers' pipelines.
_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
_PRESETS = (
    Preset("LTX-2", "t2v", (512, 768), 121, 24, 30, 3.0, negative_prompt=_NEGATIVE),
    Preset("LTX-2", "i2v", (512, 768), 121, 24, 30, 3.0, negative_prompt=_NEGATIVE),
)

_STREAMS = ("", "audio_")  # of the video and of the sound
_CROSS = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

LTX2 = ModelSpec(
    title="LTX-2",
    transformer="LTX2VideoTransformer3DModel",
    blocks=("transformer_blocks",),
    # The gate of each head, from LTX-2.3 on, reads what the query reads.
    groups=(
        *(tuple(f"{stream}attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_gate_logits")) for stream in _STREAMS),
        *((f"{attention}.to_q", f"{attention}.to_gate_logits") for attention in _CROSS),
        *((f"{attention}.to_k", f"{attention}.to_v") for attention in _CROSS),
    ),
    # The sound that they make beside the frames is not written.
    pipelines={
        "LTX2Pipeline": PipelineSpec("t2v", _CALL),
        "LTX2ImageToVideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}),
    },
    hosts=(
        "LTX2ConditionPipeline",  # images and videos, each at a frame of its own
        "LTX2InContextPipeline",  # a video to follow
        "LTX2HDRPipeline",  # a video to make brighter
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    ),
    needed=("patch_size",),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Lightricks/LTX-2"),),
    # Source: examples/diffusers/quantization/utils.py of NVIDIA's Model Optimizer.
    recipes={
        "Model Optimizer": "the first and last three of 48 blocks; with mxdit that is a choice (`num_bf16_fallback_layers`)"
    },
)

SPECS = (LTX2,)
