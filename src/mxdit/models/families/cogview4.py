"""CogView 4: text and image through one list of blocks, which makes images."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

COGVIEW4 = ModelSpec(
    title="CogView 4",
    transformer="CogView4Transformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    keep={"norm1.linear": MODULATION},
    hosts=("CogView4Pipeline", "CogView4ControlPipeline"),
    # Source: transformer/config.json of the release; all else as diffusers' class has it.
    published=(
        Published("THUDM/CogView4-6B", {"num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 128}),
    ),
)

SPECS = (COGVIEW4,)
