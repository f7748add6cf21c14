"""SANA-Video (T2V, I2V): Sana's linear attention with frames, and a feed-forward of convolutions, which stay."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

SANA_VIDEO = ModelSpec(
    title="SANA-Video",
    transformer="SanaVideoTransformer3DModel",
    # The feed-forward is of convolutions (ff.conv_inverted, conv_depth, conv_point, conv_temp), no linears: 62 % of a
    # block's weights.
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    hosts=("SanaVideoPipeline", "SanaImageToVideoPipeline"),
    # Source: scripts/convert_sana_video_to_diffusers.py of diffusers; all else as diffusers' class has it.
    published=(Published("Efficient-Large-Model/SANA-Video_2B_480p_diffusers", {"mlp_ratio": 3.0}),),
)

SPECS = (SANA_VIDEO,)
