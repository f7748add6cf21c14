"""AuraFlow: blocks for image and text apart and then blocks for both, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages; a patch is p x p latents, and has a place in a square table."""
    stages, patch = len(vae.get("block_out_channels") or (1, 2, 4, 4)), int(config["patch_size"])
    return Geometry(multiple=2 ** (stages - 1) * patch, positions=isqrt(int(config["pos_embed_max_size"])))


AURAFLOW = ModelSpec(
    title="AuraFlow",
    transformer="AuraFlowTransformer2DModel",
    blocks=("joint_transformer_blocks", "single_transformer_blocks"),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the joint blocks only
        ("ff.linear_1", "ff.linear_2"),
        ("ff_context.linear_1", "ff_context.linear_2"),
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear"), MODULATION),
    pipelines={
        "AuraFlowPipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    needed=("num_mmdit_layers", "num_single_dit_layers", "patch_size", "pos_embed_max_size"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("AuraFlow", "t2i", (1024, 1024), 1, 1, 50, 3.5),),
    # Source: transformer/config.json of the release; all else as diffusers' class has it.
    published=(Published("fal/AuraFlow", {"pos_embed_max_size": 4096}),),
)

SPECS = (AURAFLOW,)
