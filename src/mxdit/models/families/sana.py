"""Sana, Sana 1.5 and Sana Sprint: linear attention, and a feed-forward of convolutions, which stay."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

# Source: scripts/convert_sana_to_diffusers.py of diffusers and the card of SANA 1.5; all else as diffusers' class has it.
_QK_NORM = {"qk_norm": "rms_norm_across_heads"}


SANA = ModelSpec(
    title="Sana",
    transformer="SanaTransformer2DModel",
    # The feed-forward is of convolutions (ff.conv_inverted, conv_depth, conv_point), no linears: half of a block's weights.
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    hosts=("SanaPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaControlNetPipeline"),
    published=(
        Published("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
        Published("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", {**_QK_NORM, "guidance_embeds": True}),
    ),
)

SPECS = (SANA,)
