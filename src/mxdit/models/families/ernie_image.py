"""ERNIE-Image: one sequence of image and text, whose modulation all blocks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents, which a patch may join further."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2 * int(config["patch_size"]))


# Source: transformer/config.json of both models.
_RELEASE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
    "text_in_dim": 3072,
}

# Source of the figures: the defaults of diffusers' ErnieImagePipeline. ERNIE-Image-Turbo has the same sizes, and takes 8 steps
# and guidance 1: ask for them. The pipeline's optional model that rewrites the prompt draws its words by a random state that
# is not the request's, so the same seed would not make the same image.
_PRESETS = (Preset("ERNIE-Image", "t2i", (1024, 1024), 1, 1, 50, 4.0, arguments={"use_pe": False}),)


ERNIE_IMAGE = ModelSpec(
    title="ERNIE-Image",
    transformer="ErnieImageTransformer2DModel",
    # The timestep is turned into shifts and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("layers",),
    groups=(
        ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    pipelines={
        "ErnieImagePipeline": PipelineSpec(
            "t2i",
            {
                "prompt": "prompt",
                "negative_prompt": "negative_prompt",
                "height": "height",
                "width": "width",
                "steps": "num_inference_steps",
                "guidance": "guidance_scale",
            },
            output="images",
        )
    },
    needed=("patch_size",),
    geometry=_geometry,
    presets=_PRESETS,
    published=(Published("baidu/ERNIE-Image", _RELEASE), Published("baidu/ERNIE-Image-Turbo", _RELEASE)),
)

SPECS = (ERNIE_IMAGE,)
