"""Ovis-Image: one transformer of two lists of blocks, with gated feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents into one token."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2)


# Source of the figures: the defaults of diffusers' OvisImagePipeline.
_PRESETS = (Preset("Ovis-Image", "t2i", (1024, 1024), 1, 1, 50, 5.0),)

OVIS_IMAGE = ModelSpec(
    title="Ovis-Image",
    transformer="OvisImageTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # The MLP's first linear is in the single blocks only.
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    pipelines={
        "OvisImagePipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    needed=("num_layers", "num_single_layers"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("AIDC-AI/Ovis-Image-7B"),),
)

SPECS = (OVIS_IMAGE,)
