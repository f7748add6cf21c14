"""SANA-Video (T2V, I2V): Sana's linear attention with frames, and a feed-forward of convolutions, which stay."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A patch is 1 x p x p latents of one VAE for 480p and of another for 720p; the pipelines take multiples of 32."""
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or 8
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4
    return Geometry(lcm(32, int(spatial) * int(config["patch_size"][1])), int(temporal), config["rope_max_seq_len"])


_CALL = {**VIDEO_CALL, "frames": "frames"}
_FLOAT32 = ("vae",)  # as diffusers' examples load it

# Source of the figures: the defaults of diffusers' pipelines and their examples, which are of 480p; 720p is the size that its
# table of aspects has for 16:9. The size that is asked for is the one that is computed: by itself a pipeline takes the nearest
# of a table and scales what it made.
_ASKED = {"use_resolution_binning": False}
_720P = {"sample_size": 22}
_PRESETS = tuple(
    preset
    for task in ("t2v", "i2v")
    for preset in (
        Preset("SANA-Video-720p", task, (704, 1280), 81, 16, 50, 6.0, config=_720P, arguments=_ASKED),
        Preset("SANA-Video-480p", task, (480, 832), 81, 16, 50, 6.0, arguments=_ASKED),
    )
)

SANA_VIDEO = ModelSpec(
    title="SANA-Video",
    transformer="SanaVideoTransformer3DModel",
    # The feed-forward is of convolutions (ff.conv_inverted, conv_depth, conv_point, conv_temp), no linears: 62 % of a
    # block's weights.
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    pipelines={
        "SanaVideoPipeline": PipelineSpec("t2v", _CALL, float32=_FLOAT32),
        "SanaImageToVideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}, float32=_FLOAT32),
    },
    needed=("num_layers", "patch_size", "rope_max_seq_len"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: scripts/convert_sana_video_to_diffusers.py of diffusers; all else as diffusers' class has it.
    published=(Published("Efficient-Large-Model/SANA-Video_2B_480p_diffusers", {"mlp_ratio": 3.0}),),
)

SPECS = (SANA_VIDEO,)
