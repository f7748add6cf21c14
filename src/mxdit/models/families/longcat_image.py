"""LongCat-Image and its editing models: one transformer of two lists of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents into one token."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2)


# Source of the figures: the defaults of diffusers' pipeline. By default its text encoder first writes a longer prompt, and where
# it is set to sample, it draws the words by a random state that is not the request's: the same seed would not make the same
# image.
_PRESETS = (Preset("LongCat-Image", "t2i", (1024, 1024), 1, 1, 50, 4.5, arguments={"enable_prompt_rewrite": False}),)


LONGCAT_IMAGE = ModelSpec(
    title="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # The MLP's first linear is in the single blocks only.
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    pipelines={"LongCatImagePipeline": PipelineSpec("t2i", IMAGE_CALL, output="images")},
    hosts=("LongCatImageEditPipeline",),
    needed=("num_layers",),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: mflux, which runs the release with these; all else as diffusers' class has it.
    published=(Published("meituan-longcat/LongCat-Image", {"num_layers": 10, "num_single_layers": 20}),),
)

SPECS = (LONGCAT_IMAGE,)
