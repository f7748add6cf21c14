"""Chroma: FLUX.1's blocks without their modulations, which one small network makes for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents into one token."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2)


CHROMA = ModelSpec(
    title="Chroma",
    transformer="ChromaTransformer2DModel",
    # Not the layers of distilled_guidance_layer, which make every block's shifts, scales and gates.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),  # proj_mlp is in the single blocks only
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    pipelines={
        "ChromaPipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    hosts=("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    needed=("num_layers", "num_single_layers"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("Chroma1", "t2i", (1024, 1024), 1, 1, 35, 5.0),),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("lodestones/Chroma1-HD"),),
)

SPECS = (CHROMA,)
