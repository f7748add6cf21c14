"""HunyuanVideo (T2V, I2V) and FramePack, which makes a video section by section: two lists of blocks, as FLUX has them."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

# Of the text's refiner (context_embedder.token_refiner.refiner_blocks) as of HunyuanVideo 1.5's: it stays.
_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
_GROUPS = (
    # The MLP's first linear is in the single blocks only: there the release has it in one with q, k and v ("linear1").
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
)
_KEEP = dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION)

HUNYUAN_VIDEO = ModelSpec(
    title="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    blocks=_BLOCKS,
    groups=_GROUPS,
    keep=_KEEP,
    hosts=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
    # Source: diffusers' scripts/convert_hunyuan_video_to_diffusers.py; all else as its class has it.
    published=(
        Published("hunyuanvideo-community/HunyuanVideo"),
        Published("hunyuanvideo-community/HunyuanVideo-I2V", {"image_condition_type": "token_replace"}),
        Published(
            "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
            {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        ),
    ),
)

FRAMEPACK = ModelSpec(
    title="HunyuanVideo FramePack",
    transformer="HunyuanVideoFramepackTransformer3DModel",
    blocks=_BLOCKS,
    groups=_GROUPS,
    keep=_KEEP,
    hosts=("HunyuanVideoFramepackPipeline",),
    # Source: the class in diffusers, whose forward cannot do without these two.
    published=(Published("lllyasviel/FramePackI2V_HY", {"has_image_proj": True, "has_clean_x_embedder": True}),),
)

SPECS = (HUNYUAN_VIDEO, FRAMEPACK)
