"""GLM-Image: an autoregressive model draws coarse tokens first, and the transformer follows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A coarse token, which the autoregressive model draws, stands for 2 x 2 patches of p x p latents."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * int(config["patch_size"]) * 2)


GLM_IMAGE = ModelSpec(
    title="GLM-Image",
    transformer="GlmImageTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),  # image and text are one sequence
    keep={"norm1.linear": MODULATION},
    pipelines={
        "GlmImagePipeline": PipelineSpec(
            "t2i",
            # Its guidance is away from no coarse tokens, and not from a negative prompt.
            {
                "prompt": "prompt",
                "height": "height",
                "width": "width",
                "steps": "num_inference_steps",
                "guidance": "guidance_scale",
            },
            output="images",
        )
    },
    idle=("kv_caches",),  # of images to edit, which a request does not give
    needed=("num_layers", "patch_size"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("GLM-Image", "t2i", (1024, 1024), 1, 1, 50, 1.5),),
    # Source: GlmImageArchConfig of SGLang (multimodal_gen/configs/models/dits); all else as diffusers' class has it.
    published=(Published("zai-org/GLM-Image", {"attention_head_dim": 128, "num_attention_heads": 32}),),
)

SPECS = (GLM_IMAGE,)
