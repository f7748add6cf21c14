"""Lumina 2: one sequence of text and image through one list of blocks, behind a refiner of each, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The pipeline takes every VAE for one of stride 8; a patch is p x p latents, and has a place in a table."""
    patch = int(config["patch_size"])
    return Geometry(multiple=8 * patch, positions=min(config["axes_lens"][1:]))


LUMINA2 = ModelSpec(
    title="Lumina 2",
    transformer="Lumina2Transformer2DModel",
    # Not the text's refiner (context_refiner): two blocks beside 26, which see the text alone.
    blocks=("noise_refiner", "layers"),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v"), ("feed_forward.linear_1", "feed_forward.linear_3")),
    keep={"norm1.linear": MODULATION},
    pipelines={
        "Lumina2Pipeline": PipelineSpec(
            "t2i",
            IMAGE_CALL,
            output="images",
        )
    },
    needed=("num_layers", "patch_size", "axes_lens"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("Lumina-Image-2.0", "t2i", (1024, 1024), 1, 1, 30, 4.0),),
    # Source: transformer/config.json of the release; all else as diffusers' class has it.
    published=(Published("Alpha-VLLM/Lumina-Image-2.0", {"cap_feat_dim": 2304}),),
)

SPECS = (LUMINA2,)
