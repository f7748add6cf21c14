"""Motif-Video (T2V and I2V): two lists of blocks as HunyuanVideo has them, of which the last single ones only see the video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.families.hunyuan_video import HUNYUAN_VIDEO
from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Wan's VAE, and a patch is 1 x p x p of its latents."""
    return Geometry(
        multiple=int(vae.get("scale_factor_spatial") or 8) * int(config["patch_size"]),
        temporal=int(vae.get("scale_factor_temporal") or 4),
    )


_CALL = {**VIDEO_CALL, "guidance": "guider.guidance_scale"}

# Source of the figures: the defaults of diffusers' pipelines and their examples. The directory's guider/ has the guidance.
_PRESETS = (
    Preset("Motif-Video", "t2v", (736, 1280), 121, 24, 50),
    Preset("Motif-Video", "i2v", (736, 1280), 121, 24, 50),
)

# Source: diffusers' page on the class has 12 double, 16 single and 8 decoder blocks; 12 heads are those that make it the 2
# billion weights of its name.
_2B = {
    "num_layers": 12,
    "num_single_layers": 24,
    "num_decoder_layers": 8,
    "num_attention_heads": 12,
    "enable_text_cross_attention_single": True,
}


MOTIF_VIDEO = ModelSpec(
    title="Motif-Video",
    transformer="MotifVideoTransformer3DModel",
    blocks=HUNYUAN_VIDEO.blocks,
    groups=(
        *HUNYUAN_VIDEO.groups,
        ("cross_attn.to_k", "cross_attn.to_v"),  # they read the text without the image that it may follow
    ),
    keep=HUNYUAN_VIDEO.keep,
    pipelines={
        "MotifVideoPipeline": PipelineSpec("t2v", _CALL),
        "MotifVideoImage2VideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}),
    },
    needed=("num_layers", "num_single_layers", "patch_size"),
    geometry=_geometry,
    presets=_PRESETS,
    published=(Published("Motif-Technologies/Motif-Video-2B", _2B),),
)

SPECS = (MOTIF_VIDEO,)
