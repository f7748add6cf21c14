"""Sana, Sana 1.5 and Sana Sprint: linear attention, and a feed-forward of convolutions, which stay."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import IMAGE_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages; the pipeline takes multiples of 32."""
    stages = len(vae.get("encoder_block_out_channels") or (1,) * 6)
    return Geometry(multiple=lcm(32, 2 ** (stages - 1) * int(config["patch_size"])))


# Source of the figures: the defaults of diffusers' pipeline, and the sizes that the models are named by. The size that is asked
# for is the one that is computed: by itself the pipeline takes the nearest of a table and scales what it made.
_ASKED = {"use_resolution_binning": False}
_PRESETS = tuple(
    Preset(
        f"Sana-{32 * sample}px", "t2i", (32 * sample, 32 * sample), 1, 1, 20, 4.5,
        config={} if sample == 32 else {"sample_size": sample}, arguments=_ASKED,
    )
    for sample in (16, 64, 128, 32)
)  # fmt: skip

# Source: scripts/convert_sana_to_diffusers.py of diffusers; all else as diffusers' class has it.
_QK_NORM = {"qk_norm": "rms_norm_across_heads"}


SANA = ModelSpec(
    title="Sana",
    transformer="SanaTransformer2DModel",
    # The feed-forward is of convolutions (ff.conv_inverted, conv_depth, conv_point), no linears: half of a block's weights.
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    pipelines={
        "SanaPipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    # Sprint's pipelines take an argument for two steps that they refuse for any other number.
    hosts=("SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaControlNetPipeline"),
    needed=("num_layers", "patch_size", "sample_size"),
    geometry=_geometry,
    presets=_PRESETS,
    published=(
        Published("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
        Published("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", {**_QK_NORM, "guidance_embeds": True}),
    ),
)

SPECS = (SANA,)
