"""Cosmos 1, Predict2 and Predict2.5 (text, image and video to world; text to image): one transformer for all of them."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

# Source: diffusers' convert_cosmos_to_diffusers.py; all else as diffusers' class has it.
_IMAGE = {"in_channels": 17}  # one channel says which frames are given
_2B = {"num_attention_heads": 16, "extra_pos_embed_type": None}
_14B = {"num_attention_heads": 40, "num_layers": 36}
_REASON = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}
_PUBLISHED = (
    Published("nvidia/Cosmos-1.0-Diffusion-7B-Text2World"),
    Published("nvidia/Cosmos-1.0-Diffusion-7B-Video2World", _IMAGE),
    Published("nvidia/Cosmos-1.0-Diffusion-14B-Text2World", {**_14B, "rope_scale": (2.0, 2.0, 2.0)}),
    Published("nvidia/Cosmos-Predict2-2B-Text2Image", {**_2B, "rope_scale": (1.0, 4.0, 4.0)}),
    Published("nvidia/Cosmos-Predict2-2B-Video2World", {**_2B, **_IMAGE, "rope_scale": (1.0, 3.0, 3.0)}),
    Published(
        "nvidia/Cosmos-Predict2-14B-Video2World",
        {**_14B, **_IMAGE, "extra_pos_embed_type": None, "rope_scale": (20 / 24, 2.0, 2.0)},
    ),
    Published("nvidia/Cosmos-Predict2.5-2B", {**_2B, **_IMAGE, **_REASON, "rope_scale": (1.0, 3.0, 3.0)}),
)


COSMOS = ModelSpec(
    title="Cosmos 1, Predict2 and Predict2.5",
    transformer="CosmosTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_q", "attn2.q_img"),  # the second is that of an image that is looked at, in Transfer2.5
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.k_img", "attn2.v_img"),
    ),
    # Where frames are given, each token has its frame's timestep, so these linears see as many rows as the others; they
    # are a twentieth of the weights and go through 256 channels.
    keep=dict.fromkeys(
        ("norm1.linear_1", "norm1.linear_2", "norm2.linear_1", "norm2.linear_2", "norm3.linear_1", "norm3.linear_2"),
        MODULATION,
    ),
    # All of them make a safety checker of `cosmos_guardrail` when they are given none, and cannot be built without it.
    hosts=(
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    ),
    published=_PUBLISHED,
)

SPECS = (COSMOS,)
