"""Stable Diffusion 3 and 3.5: one transformer with a stream for the image and one for the text, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages; a patch is p x p latents, and has a place in a square table."""
    stages, patch = len(vae.get("block_out_channels") or (1, 2, 4, 4)), int(config["patch_size"])
    return Geometry(multiple=2 ** (stages - 1) * patch, positions=int(config["pos_embed_max_size"]))


# Source of the figures: the defaults of diffusers' pipeline; of 3.5, its model cards.
_35 = {"qk_norm": "rms_norm"}
_PRESETS = (
    Preset(
        "Stable-Diffusion-3.5-medium", "t2i", (1024, 1024), 1, 1, 40, 4.5, config={**_35, "pos_embed_max_size": 384}
    ),
    Preset("Stable-Diffusion-3.5-large", "t2i", (1024, 1024), 1, 1, 28, 3.5, config=_35),
    Preset("Stable-Diffusion-3-medium", "t2i", (1024, 1024), 1, 1, 28, 7.0),
)
# Source: transformer/config.json of the releases; all else as diffusers' class has it.
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_RELEASES = (
    Published("stabilityai/stable-diffusion-3-medium-diffusers", {**_MEDIUM, "pos_embed_max_size": 192}),
    Published(
        "stabilityai/stable-diffusion-3.5-medium",
        {**_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    Published(
        "stabilityai/stable-diffusion-3.5-large",
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
)  # fmt: skip

STABLE_DIFFUSION3 = ModelSpec(
    title="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"),  # the image alone, in the first blocks of 3.5 medium
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear"), MODULATION),
    pipelines={
        "StableDiffusion3Pipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    hosts=(
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    needed=("num_layers", "patch_size", "pos_embed_max_size"),
    geometry=_geometry,
    presets=_PRESETS,
    published=_RELEASES,
)

SPECS = (STABLE_DIFFUSION3,)
