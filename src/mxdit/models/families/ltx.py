"""LTX-Video (2B and 13B): one transformer, whose modulations are tables in its blocks and one linear outside of them."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

LTX = ModelSpec(
    title="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # of the text
    ),
    hosts=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",  # images and videos, each at a frame of its own
        "LTXI2VLongMultiPromptPipeline",  # one prompt for each part of a long clip
    ),
    # Source: diffusers' class, whose defaults are those of the 2B; Lightricks' LTX-Video-Trainer has the config of the 13B.
    published=(
        Published("Lightricks/LTX-Video"),
        Published(
            "Lightricks/LTX-Video-0.9.7-dev", {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}
        ),
    ),
)

SPECS = (LTX,)
