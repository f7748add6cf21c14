"""Stable Diffusion 3 and 3.5: one transformer with a stream for the image and one for the text, which makes images."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

# Source: transformer/config.json of the releases; all else as diffusers' class has it.
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
_RELEASES = (
    Published("stabilityai/stable-diffusion-3-medium-diffusers", {**_MEDIUM, "pos_embed_max_size": 192}),
    Published(
        "stabilityai/stable-diffusion-3.5-medium",
        {**_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    Published(
        "stabilityai/stable-diffusion-3.5-large",
        {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
)  # fmt: skip

STABLE_DIFFUSION3 = ModelSpec(
    title="Stable Diffusion 3",
    transformer="SD3Transformer2DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"),  # the image alone, in the first blocks of 3.5 medium
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear"), MODULATION),
    hosts=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    published=_RELEASES,
)

SPECS = (STABLE_DIFFUSION3,)
