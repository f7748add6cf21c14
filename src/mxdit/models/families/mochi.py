"""Mochi 1: one transformer of two streams, the text's of half the video's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import MODULATION, VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The pipeline takes the VAE's stride for 6 x 8 x 8, whatever it is; a patch is p x p of the latents."""
    return Geometry(multiple=8 * int(config["patch_size"]), temporal=6)


MOCHI = ModelSpec(
    title="Mochi 1",
    transformer="MochiTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),  # the text's side
    ),
    # 27 % of the weights. The last block ends the text's stream: its norm has a scale alone, by a linear of another name.
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm1_context.linear_1"), MODULATION),
    pipelines={
        "MochiPipeline": PipelineSpec(
            "t2v",
            VIDEO_CALL,
        )
    },
    needed=("patch_size",),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline; the frames, 30 a second, are those of its documentation.
    presets=(Preset("Mochi 1", "t2v", (480, 848), 85, 30, 64, 4.5),),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("genmo/mochi-1-preview"),),
)

SPECS = (MOCHI,)
