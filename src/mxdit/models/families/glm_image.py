"""GLM-Image: an autoregressive model draws coarse tokens first, and the transformer follows them."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

GLM_IMAGE = ModelSpec(
    title="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),  # image and text are one sequence
    keep={"norm1.linear": MODULATION},
    # Not in `pipelines`, for want of a tiny one: it needs the autoregressive model and its processor.
    hosts=("GlmImagePipeline",),
    # Source: GlmImageArchConfig of SGLang (multimodal_gen/configs/models/dits); all else as diffusers' class has it.
    published=(Published("zai-org/GLM-Image", {"attention_head_dim": 128, "num_attention_heads": 32}),),
)

SPECS = (GLM_IMAGE,)
