"""EasyAnimate (V5.1): one transformer, whose text has weights of its own in some or all blocks."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

EASYANIMATE = ModelSpec(
    title="EasyAnimate V5.1",
    transformer="EasyAnimateTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        (
            "attn1.add_q_proj",
            "attn1.add_k_proj",
            "attn1.add_v_proj",
        ),  # the text's side, in the first `mmdit_layers` blocks
    ),
    keep=dict.fromkeys(("norm1.linear", "norm2.linear"), MODULATION),
    hosts=(
        "EasyAnimatePipeline",
        "EasyAnimateInpaintPipeline",  # I2V, by a video and its mask
        "EasyAnimateControlPipeline",
    ),
    # Source: diffusers' class, whose docstring has the three sizes that it has no defaults for.
    published=(
        Published(
            "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers", {"in_channels": 16, "out_channels": 16, "patch_size": 2}
        ),
    ),
)

SPECS = (EASYANIMATE,)
