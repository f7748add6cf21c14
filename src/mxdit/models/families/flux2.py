"""FLUX.2 (dev, klein): one transformer of two lists of blocks, whose modulation all blocks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents into one token."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2)


_CALL = {
    "prompt": "prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}

# Source of the figures: the defaults of diffusers' pipelines. The guidance of dev is a number that the model was distilled
# to take. klein's are those of its base models: the config of its distilled ones is the same, and they take 4 steps and no
# guidance.
_PRESETS = (
    Preset("FLUX.2-klein", "t2i", (1024, 1024), 1, 1, 50, 4.0, config={"guidance_embeds": False}),
    Preset("FLUX.2-dev", "t2i", (1024, 1024), 1, 1, 50, 4.0),
)

# Source: diffusers' class, whose defaults are those of dev, and scripts/convert_flux2_to_diffusers.py of diffusers for klein.
_KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_KLEIN_9B = {
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}


FLUX2 = ModelSpec(
    title="FLUX.2",
    transformer="Flux2Transformer2DModel",
    # Timestep and guidance are turned into shifts and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),  # in the single blocks one linear ("to_qkv_mlp_proj") already
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    pipelines={
        "Flux2Pipeline": PipelineSpec("t2i", _CALL, output="images"),
        "Flux2KleinPipeline": PipelineSpec("t2i", _CALL, output="images"),
    },
    hosts=("Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    needed=("num_layers", "num_single_layers"),
    geometry=_geometry,
    presets=_PRESETS,
    published=(
        Published("black-forest-labs/FLUX.2-dev"),
        Published("black-forest-labs/FLUX.2-klein-4B", _KLEIN_4B),
        Published("black-forest-labs/FLUX.2-klein-9B", _KLEIN_9B),
    ),
)

SPECS = (FLUX2,)
