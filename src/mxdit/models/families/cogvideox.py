"""CogVideoX (1.0 and 1.5; T2V and I2V): one transformer, one sequence of text and video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import MODULATION, VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and a patch is p x p of its latents (1.5: of two latent frames).

    It decodes two latent frames at a time, and one before them: an even number of them would come out longer than asked for.
    CogVideoX-5b-I2V has learned positions, of the one size that its config has: diffusers refuses any other.
    """
    stages, stride = len(vae.get("block_out_channels") or (128, 256, 256, 512)), vae.get("temporal_compression_ratio")
    return Geometry(multiple=2 ** (stages - 1) * int(config["patch_size"]), temporal=2 * int(stride or 4))


# Source of the figures: the defaults and examples of diffusers' pipelines and transformer (90 x 60 latents of 8 x 8 pixels),
# and for 1.5 its documentation of them.
_V15 = {"patch_size_t": 2}
_PRESETS = (
    Preset("CogVideoX1.5", "t2v", (768, 1360), 81, 16, 50, 6.0, config=_V15),
    Preset("CogVideoX1.5", "i2v", (768, 1360), 81, 16, 50, 6.0, config=_V15),
    Preset("CogVideoX", "t2v", (480, 720), 49, 8, 50, 6.0),
    Preset("CogVideoX", "i2v", (480, 720), 49, 8, 50, 6.0, arguments={"use_dynamic_cfg": True}),
)

_5B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}

COGVIDEOX = ModelSpec(
    title="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    # A seventh of the weights of the 5B.
    keep=dict.fromkeys(("norm1.linear", "norm2.linear"), MODULATION),
    pipelines={
        "CogVideoXPipeline": PipelineSpec("t2v", VIDEO_CALL, embeddings=("prompt_embeds", "negative_prompt_embeds")),
        "CogVideoXImageToVideoPipeline": PipelineSpec(
            "i2v", {**VIDEO_CALL, "image": "image"}, embeddings=("prompt_embeds", "negative_prompt_embeds")
        ),
    },
    hosts=(
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    needed=("patch_size",),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are those of the 2B, and its convert_cogvideox_to_diffusers.py.
    published=(Published("THUDM/CogVideoX-2b"), Published("THUDM/CogVideoX-5b", _5B)),
)

SPECS = (COGVIDEOX,)
