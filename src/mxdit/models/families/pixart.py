"""PixArt (alpha and sigma): one transformer with the text in cross-attention, which makes images."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

PIXART = ModelSpec(
    title="PixArt",
    transformer="PixArtTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    hosts=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    # Source: scripts/convert_pixart_alpha_to_diffusers.py and convert_pixart_sigma_to_diffusers.py of diffusers; all else as
    # diffusers' class has it.
    published=(
        Published("PixArt-alpha/PixArt-XL-2-1024-MS", {"caption_channels": 4096}),
        Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", {"caption_channels": 4096, "use_additional_conditions": False}
        ),
    ),
)

SPECS = (PIXART,)
