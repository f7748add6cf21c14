"""HunyuanImage 2.1 (base, distilled, refiner): one transformer of two lists of blocks."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

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
    hosts=("HunyuanImagePipeline", "HunyuanImageRefinerPipeline"),
    # Source: scripts/convert_hunyuan_image_to_diffusers.py of diffusers.
    published=(Published("hunyuanvideo-community/HunyuanImage-2.1-Diffusers", {"text_embed_2_dim": 1472}),),
)

SPECS = (HUNYUAN_IMAGE,)
