"""Qwen-Image, its editing and layered models, and Qwen-Image 2.1: two classes of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image at each of its downsamplings, and the pipeline packs 2 x 2 latents into one token."""
    halvings = len(vae.get("temperal_downsample") or (False, True, True))
    return Geometry(multiple=2**halvings * 2)


# Source of the figures: the defaults of diffusers' QwenImagePipeline. Its guidance counts beside a negative prompt alone, of
# which an empty one is one.
_PRESETS = (Preset("Qwen-Image", "t2i", (1024, 1024), 1, 1, 50, 4.0),)


QWEN_IMAGE = ModelSpec(
    title="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side
    ),
    keep=dict.fromkeys(("img_mod.1", "txt_mod.1"), MODULATION),
    pipelines={
        "QwenImagePipeline": PipelineSpec(
            "t2i",
            {**IMAGE_CALL, "guidance": "true_cfg_scale"},
            output="images",
        )
    },
    hosts=(
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    needed=("num_layers",),
    geometry=_geometry,
    presets=_PRESETS,
    recipes={  # source: the patterns of layers in SGLang's quantization config for nunchaku
        "nunchaku, in SGLang": "nothing of the blocks: modulations have 4-bit weights and 16-bit activations, W4A16, which would"
        " save memory alone; here they stay"
    },
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Qwen/Qwen-Image"),),
)

QWEN_IMAGE_21 = ModelSpec(
    title="Qwen-Image 2.1",
    transformer="QwenImage21Transformer2DModel",
    # The timestep is turned into scales and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("transformer_blocks",),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v"), ("img_mlp.proj", "img_mlp.gate_layer")),
    # Not in `pipelines`: its pictures have a fourth channel, alpha, which a result has not; and a directory may fix the noise
    # levels, and so the number of steps that a request asks for.
    hosts=("QwenImage21Pipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Qwen/Qwen-Image-2.1"),),
)

SPECS = (QWEN_IMAGE, QWEN_IMAGE_21)
