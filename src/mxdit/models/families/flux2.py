"""FLUX.2 (dev, klein): one transformer of two lists of blocks, whose modulation all blocks share."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

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
    hosts=("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    published=(
        Published("black-forest-labs/FLUX.2-dev"),
        Published("black-forest-labs/FLUX.2-klein-4B", _KLEIN_4B),
        Published("black-forest-labs/FLUX.2-klein-9B", _KLEIN_9B),
    ),
)

SPECS = (FLUX2,)
