"""FLUX.3: blocks for the text, the image and images to follow apart, and then blocks for all of them."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

FLUX3 = ModelSpec(
    title="FLUX.3",
    transformer="Flux3Transformer2DModel",
    # The text's blocks are as wide as the others and as many as the image's.
    blocks=("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks"),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v", "ff.linear_in"),),
    hosts=("Flux3ModularPipeline", "Flux3DistilledModularPipeline"),  # which are modular: diffusers has no others
    # Source: the model cards, and diffusers' class, whose defaults are the base model's.
    published=(
        Published("black-forest-labs/flux-3-image-klein-base"),
        Published("black-forest-labs/flux-3-image-klein", {"flow_map": True}),
    ),
)

SPECS = (FLUX3,)
