"""Allegro: one transformer, whose modulations are tables in its blocks and one linear outside of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE decodes whole tiles of 24 frames and `sample_size` pixels a side, which share 8 frames, 120 rows and 80 columns;
    a patch is p x p of its latents."""
    tile, stages = int(vae.get("sample_size") or 320), len(vae.get("block_out_channels") or (128, 256, 512, 512))
    multiple = 2 ** (stages - 1) * int(config["patch_size"])
    steps = (lcm(tile - overlap, multiple) for overlap in (120, 80))
    height, width = ((tile, step) for step in steps)
    return Geometry(multiple=multiple, temporal=16, first=24, tiles=(height, width))


ALLEGRO = ModelSpec(
    title="Allegro",
    transformer="AllegroTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # of the text
    ),
    pipelines={"AllegroPipeline": PipelineSpec("t2v", VIDEO_CALL, float32=("vae",), tiled=True)},
    needed=("patch_size",),
    geometry=_geometry,
    # Source: the model's card at Hugging Face, and the defaults and the example of diffusers' pipeline.
    presets=(Preset("Allegro", "t2v", (720, 1280), 88, 15, 100, 7.5),),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("rhymes-ai/Allegro"),),
)

SPECS = (ALLEGRO,)
