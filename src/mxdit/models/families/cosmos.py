"""Cosmos 1, Predict2 and Predict2.5 (text, image and video to world; text to image): one transformer for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import (
    IMAGE_CALL,
    MODULATION,
    VIDEO_CALL,
    Geometry,
    ModelSpec,
    PipelineSpec,
    Preset,
    Published,
)

# Source: diffusers' convert_cosmos_to_diffusers.py; all else as diffusers' class has it.
_IMAGE = {"in_channels": 17}  # one channel says which frames are given
_2B = {"num_attention_heads": 16, "extra_pos_embed_type": None}
_14B = {"num_attention_heads": 40, "num_layers": 36}
_REASON = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}
_PUBLISHED = (
    Published("nvidia/Cosmos-1.0-Diffusion-7B-Text2World"),
    Published("nvidia/Cosmos-1.0-Diffusion-7B-Video2World", _IMAGE),
    Published("nvidia/Cosmos-1.0-Diffusion-14B-Text2World", {**_14B, "rope_scale": (2.0, 2.0, 2.0)}),
    Published("nvidia/Cosmos-Predict2-2B-Text2Image", {**_2B, "rope_scale": (1.0, 4.0, 4.0)}),
    Published("nvidia/Cosmos-Predict2-2B-Video2World", {**_2B, **_IMAGE, "rope_scale": (1.0, 3.0, 3.0)}),
    Published(
        "nvidia/Cosmos-Predict2-14B-Video2World",
        {**_14B, **_IMAGE, "extra_pos_embed_type": None, "rope_scale": (20 / 24, 2.0, 2.0)},
    ),
    Published("nvidia/Cosmos-Predict2.5-2B", {**_2B, **_IMAGE, **_REASON, "rope_scale": (1.0, 3.0, 3.0)}),
)


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Cosmos 1 has a VAE whose strides are in its config, and the others have Wan's, which halves in each of its stages; the
    pipelines take multiples of 16."""
    stages = vae.get("temperal_downsample") or (False, True, True)
    space = vae.get("spatial_compression_ratio") or 2 ** len(stages)
    time = vae.get("temporal_compression_ratio") or 2 ** sum(stages)
    sides = (most // patch for most, patch in zip(config["max_size"], config["patch_size"], strict=True))
    multiple = lcm(16, int(space) * int(config["patch_size"][-1]))
    return Geometry(multiple=multiple, temporal=int(time), positions=min(sides))


# NVIDIA's license of the models asks for a guardrail: a pipeline makes one unless it is given one, and none runs without.
_ALIKE: Any = {"makes": {"safety_checker": "cosmos_guardrail"}, "guidance_added": 1.0}
_VIDEO = {**VIDEO_CALL, "fps": "fps"}
_STEP = "pred_original_sample"  # Cosmos 1 mixes predictions of its scheduler, not of the transformer
_PIPELINES = {
    "CosmosTextToWorldPipeline": PipelineSpec("t2v", _VIDEO, **_ALIKE, step_given=_STEP),
    "CosmosVideoToWorldPipeline": PipelineSpec(
        "i2v", {**_VIDEO, "image": "image"}, float32=("vae",), **_ALIKE, step_given=_STEP
    ),  # on a CPU torch has no BF16 pooling of volumes, with which this VAE encodes
    "Cosmos2TextToImagePipeline": PipelineSpec("t2i", IMAGE_CALL, output="images", **_ALIKE),
    "Cosmos2VideoToWorldPipeline": PipelineSpec("i2v", {**_VIDEO, "image": "image"}, **_ALIKE),
    "Cosmos2_5_PredictBasePipeline": PipelineSpec("t2v", VIDEO_CALL, **_ALIKE),
}

# Source of the figures: the defaults and examples of diffusers' pipelines, whose own negative prompts these are, too.
_OWN: Any = {"negative_prompt": None}
_PRESETS = (
    Preset("Cosmos Predict2.5", "t2v", (704, 1280), 93, 16, 36, 7.0, config={"use_crossattn_projection": True}, **_OWN),
    Preset("Cosmos 1", "t2v", (704, 1280), 121, 30, 36, 7.0, **_OWN),
    Preset("Cosmos Predict2", "i2v", (704, 1280), 93, 16, 35, 7.0, config={"extra_pos_embed_type": None}, **_OWN),
    Preset("Cosmos 1", "i2v", (704, 1280), 121, 30, 36, 7.0, **_OWN),
    Preset("Cosmos Predict2", "t2i", (768, 1360), 1, 1, 35, 7.0, **_OWN),
)

COSMOS = ModelSpec(
    title="Cosmos 1, Predict2 and Predict2.5",
    transformer="CosmosTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_q", "attn2.q_img"),  # the second is that of an image that is looked at, in Transfer2.5
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.k_img", "attn2.v_img"),
    ),
    # Where frames are given, each token has its frame's timestep, so these linears see as many rows as the others; they
    # are a twentieth of the weights and go through 256 channels.
    keep=dict.fromkeys(
        ("norm1.linear_1", "norm1.linear_2", "norm2.linear_1", "norm2.linear_2", "norm3.linear_1", "norm3.linear_2"),
        MODULATION,
    ),
    packages={"torchvision": "concat_padding_mask"},
    pipelines=_PIPELINES,
    # It takes videos to follow, and beside this model a control network that always scales its masks with torchvision.
    hosts=("Cosmos2_5_TransferPipeline",),
    needed=("max_size", "patch_size"),
    geometry=_geometry,
    presets=_PRESETS,
    published=_PUBLISHED,
)

SPECS = (COSMOS,)
