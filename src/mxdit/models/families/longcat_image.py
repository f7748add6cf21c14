"""LongCat-Image and its editing models: one transformer of two lists of blocks."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

LONGCAT_IMAGE = ModelSpec(
    title="LongCat-Image",
    transformer="LongCatImageTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    groups=(
        # The MLP's first linear is in the single blocks only.
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),  # the text's side, in the double blocks only
    ),
    keep=dict.fromkeys(("norm1.linear", "norm1_context.linear", "norm.linear"), MODULATION),
    # Not in `pipelines`, for want of a tiny one: the text encoder writes another prompt first, with a processor.
    hosts=("LongCatImagePipeline", "LongCatImageEditPipeline"),
    # Source: mflux, which runs the release with these; all else as diffusers' class has it.
    published=(Published("meituan-longcat/LongCat-Image", {"num_layers": 10, "num_single_layers": 20}),),
)

SPECS = (LONGCAT_IMAGE,)
