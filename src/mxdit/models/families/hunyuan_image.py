"""HunyuanImage 2.1 (base, distilled, refiner): one transformer of two lists of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A patch is one latent, of the VAE's stride; the pipeline asks for an even number of them a side."""
    return Geometry(multiple=int(vae.get("spatial_compression_ratio") or 32) * 2)


# Source of the figures: the defaults of diffusers' HunyuanImagePipeline. Guidance differs between the published models, and
# each directory has its own in guider/; a distilled one has none there, and takes no guidance here. A prompt with text in
# quotation marks, to be written in the image, is guided by ocr_guider/ instead, as the directory has it.
_PRESETS = (Preset("HunyuanImage-2.1", "t2i", (2048, 2048), 1, 1, 50),)


HUNYUAN_IMAGE = ModelSpec(
    title="HunyuanImage 2.1",
    transformer="HunyuanImageTransformer2DModel",
    # Not the text's refiner (context_embedder.token_refiner.refiner_blocks): two small blocks that see the text alone,
    # and whose output every block takes.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # In the single blocks the MLP's first linear reads the same: the text is cut off and put back in between.
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    pipelines={
        "HunyuanImagePipeline": PipelineSpec(
            "t2i",
            {**IMAGE_CALL, "guidance": "guider.guidance_scale"},
            output="images",
        )
    },
    hosts=("HunyuanImageRefinerPipeline",),
    needed=("num_layers", "num_single_layers"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: scripts/convert_hunyuan_image_to_diffusers.py of diffusers.
    published=(Published("hunyuanvideo-community/HunyuanImage-2.1-Diffusers", {"text_embed_2_dim": 1472}),),
)

SPECS = (HUNYUAN_IMAGE,)
