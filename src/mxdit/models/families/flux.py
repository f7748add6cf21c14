"""FLUX.1 (dev, schnell): one transformer of two lists of blocks, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and the pipeline packs 2 x 2 latents into one token."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=2 ** (stages - 1) * 2)


# Source of the figures: the model cards of FLUX.1-dev and FLUX.1-schnell. The guidance of dev is a number that the model
# was distilled to take; schnell takes none, and no more than 256 tokens of text.
_PRESETS = (
    Preset(
        "FLUX.1-schnell", "t2i", (1024, 1024), 1, 1, 4,
        config={"guidance_embeds": False}, arguments={"max_sequence_length": 256},
    ),
    Preset("FLUX.1-dev", "t2i", (1024, 1024), 1, 1, 50, 3.5),
)  # fmt: skip


FLUX = ModelSpec(
    title="FLUX.1",
    transformer="FluxTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # The MLP's first linear is in the single blocks only: there the release has it in one with q, k and v ("linear1").
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    pipelines={
        "FluxPipeline": PipelineSpec(
            "t2i",
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
    hosts=(
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "VisualClozeGenerationPipeline",
        "VisualClozePipeline",
    ),
    needed=("num_layers", "num_single_layers"),
    geometry=_geometry,
    presets=_PRESETS,
    # Sources: examples/diffusers/quantization/utils.py of NVIDIA/Model-Optimizer; the patterns of layers in SGLang's
    # quantization config for nunchaku.
    recipes={
        "NVIDIA ModelOpt": "what is outside the blocks, as here; it quantizes the modulations, which are 27 % of the weights",
        "nunchaku, in SGLang": "what has a norm or an embedding in its name, and so the modulations, as here",
    },
    # Source: transformer/config.json of the releases; all else as diffusers' class has it.
    published=(
        Published("black-forest-labs/FLUX.1-dev", {"guidance_embeds": True}),
        Published("black-forest-labs/FLUX.1-schnell"),
    ),
)

SPECS = (FLUX,)
