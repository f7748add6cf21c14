"""Mochi 1: one transformer of two streams, the text's of half the video's width."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

MOCHI = ModelSpec(
    title="Mochi 1",
    transformer="MochiTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),  # the text's side
    ),
    # The last block ends the text's stream: its norm has a scale alone, by a linear of another name.
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm1_context.linear_1"), MODULATION),
    hosts=("MochiPipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("genmo/mochi-1-preview"),),
)

SPECS = (MOCHI,)
