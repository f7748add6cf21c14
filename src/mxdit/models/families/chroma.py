"""Chroma: FLUX.1's blocks without their modulations, which one small network makes for all of them."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

CHROMA = ModelSpec(
    title="Chroma",
    transformer="ChromaTransformer2DModel",
    # Not the layers of distilled_guidance_layer, which make every block's shifts, scales and gates.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),  # proj_mlp is in the single blocks only
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    hosts=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("lodestones/Chroma1-HD"),),
)

SPECS = (CHROMA,)
