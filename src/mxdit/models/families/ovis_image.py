"""Ovis-Image: one transformer of two lists of blocks, with gated feed-forwards."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

OVIS_IMAGE = ModelSpec(
    title="Ovis-Image",
    transformer="OvisImageTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # The MLP's first linear is in the single blocks only.
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    hosts=("OvisImagePipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("AIDC-AI/Ovis-Image-7B"),),
)

SPECS = (OVIS_IMAGE,)
