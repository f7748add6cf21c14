"""HunyuanVideo (T2V, I2V) and FramePack, which makes a video section by section: two lists of blocks, as FLUX has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Latents are 1/8 of the video's height and width, and a patch is 1 x p x p of them."""
    return Geometry(
        multiple=int(vae.get("spatial_compression_ratio") or 8) * int(config["patch_size"]),
        temporal=int(vae.get("temporal_compression_ratio") or 4),
    )


# Guidance is a number that the model was distilled to take, so a negative prompt has no part in it.
_CALL = {
    "prompt": "prompt",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}

# Source of the figures: the defaults of diffusers' pipelines and their examples; 24 frames a second are those of the
# release's sample_video.py. The flow shift differs between the models, and each directory has its own in scheduler/.
_PRESETS = (
    Preset("HunyuanVideo", "t2v", (720, 1280), 129, 24, 50, 6.0),
    # Was not distilled to take guidance; of the frames asked for, the pipeline gives all but the first four.
    Preset("HunyuanVideo-I2V-33ch", "i2v", (720, 1280), 129, 24, 50, config={"guidance_embeds": False}),
    Preset("HunyuanVideo-I2V", "i2v", (720, 1280), 129, 24, 50, 6.0),
)

# Of the text's refiner (context_embedder.token_refiner.refiner_blocks) as of HunyuanVideo 1.5's: it stays.
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_GROUPS = (
    # The MLP's first linear is in the single blocks only: there the release has it in one with q, k and v ("linear1").
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
)
_KEEP: dict[str, str] = dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION)

HUNYUAN_VIDEO = ModelSpec(
    title="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    blocks=_BLOCKS,
    groups=_GROUPS,
    keep=_KEEP,
    pipelines={
        "HunyuanVideoPipeline": PipelineSpec("t2v", _CALL),
        "HunyuanVideoImageToVideoPipeline": PipelineSpec("i2v", {**_CALL, "image": "image"}),
    },
    # SkyReels V1: a transformer alone is published, to be put into HunyuanVideo's directory by hand.
    hosts=("HunyuanSkyreelsImageToVideoPipeline",),
    needed=("num_layers", "num_single_layers", "patch_size"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' scripts/convert_hunyuan_video_to_diffusers.py; all else as its class has it.
    published=(
        Published("hunyuanvideo-community/HunyuanVideo"),
        Published("hunyuanvideo-community/HunyuanVideo-I2V", {"image_condition_type": "token_replace"}),
        Published(
            "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
            {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        ),
    ),
)

FRAMEPACK = ModelSpec(
    title="HunyuanVideo FramePack",
    transformer="HunyuanVideoFramepackTransformer3DModel",
    blocks=_BLOCKS,
    groups=_GROUPS,
    keep=_KEEP,
    # It makes whole sections of 36 frames, each with a schedule of its own: what no request can count.
    hosts=("HunyuanVideoFramepackPipeline",),
    # Source: the class in diffusers, whose forward cannot do without these two.
    published=(Published("lllyasviel/FramePackI2V_HY", {"has_image_proj": True, "has_clean_x_embedder": True}),),
)

SPECS = (HUNYUAN_VIDEO, FRAMEPACK)
