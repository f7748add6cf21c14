"""Krea 2: one sequence of text and image, after a small transformer that fuses layers of the text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image at each of its downsamplings, and the pipeline packs 2 x 2 latents into one token."""
    halvings = len(vae.get("temperal_downsample") or (False, True, True))
    return Geometry(multiple=2**halvings * 2)


# Source of the figures: the defaults of diffusers' Krea2Pipeline, which are the base model's: its distilled ones have the same
# config and take no guidance.
_PRESETS = (Preset("Krea-2", "t2i", (1024, 1024), 1, 1, 28, 4.5),)

KREA2 = ModelSpec(
    title="Krea 2",
    transformer="Krea2Transformer2DModel",
    # Not `text_fusion`: four small blocks that see the text alone, and whose output every block takes. The timestep is turned
    # into shifts and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("transformer_blocks",),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate"), ("ff.gate", "ff.up")),
    pipelines={
        "Krea2Pipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
            guidance_added=1.0,
        )
    },
    needed=("num_layers",),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("krea/Krea-2-Raw"),),
)

SPECS = (KREA2,)
