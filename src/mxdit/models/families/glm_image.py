"""GLM-Image: an autoregressive model draws coarse tokens first, and the transformer follows them."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

GLM_IMAGE = ModelSpec(
    title="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),  # image and text are one sequence
    keep={"norm1.linear": MODULATION},
    hosts=("GlmImagePipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("zai-org/GLM-Image"),),
)

SPECS = (GLM_IMAGE,)
