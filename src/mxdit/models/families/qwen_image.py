"""Qwen-Image, its editing and layered models, and Qwen-Image 2.1: two classes of transformers."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

QWEN_IMAGE = ModelSpec(
    title="Qwen-Image",
    transformer="QwenImageTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side
    ),
    keep=dict.fromkeys(("img_mod.1", "txt_mod.1"), MODULATION),
    hosts=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Qwen/Qwen-Image"),),
)

QWEN_IMAGE_21 = ModelSpec(
    title="Qwen-Image 2.1",
    transformer="QwenImage21Transformer2DModel",
    # The timestep is turned into scales and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("transformer_blocks",),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v"), ("img_mlp.proj", "img_mlp.gate_layer")),
    hosts=("QwenImage21Pipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Qwen/Qwen-Image-2.1"),),
)

SPECS = (QWEN_IMAGE, QWEN_IMAGE_21)
