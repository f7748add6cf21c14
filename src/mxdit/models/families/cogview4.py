"""CogView 4: text and image through one list of blocks, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and a patch is p x p latents; the pipeline takes multiples of 16."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=lcm(16, 2 ** (stages - 1) * int(config["patch_size"])))


COGVIEW4 = ModelSpec(
    title="CogView 4",
    transformer="CogView4Transformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    keep={"norm1.linear": MODULATION},
    pipelines={"CogView4Pipeline": PipelineSpec("t2i", IMAGE_CALL, output="images")},
    hosts=("CogView4ControlPipeline",),
    needed=("num_layers", "patch_size"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("CogView4", "t2i", (1024, 1024), 1, 1, 50, 5.0),),
    # Source: transformer/config.json of the release; all else as diffusers' class has it.
    published=(
        Published("THUDM/CogView4-6B", {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}),
    ),
)

SPECS = (COGVIEW4,)
