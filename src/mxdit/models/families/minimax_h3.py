"""MiniMax-H3: video with sound, text and given frames in one sequence through one stack of blocks."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

MINIMAX_H3 = ModelSpec(
    title="MiniMax-H3",
    transformer="MiniMaxH3Transformer3DModel",
    # Not the text's refiner (token_refiner.refiner_blocks): two blocks that see the text alone, and whose output every
    # block takes.
    blocks=("transformer_blocks",),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v"),),
    # 39 % of the weights. It sees one row for each noise level in the sequence, of which there are a few, and its input is
    # cast to its weight's dtype.
    keep={"adaln_proj.linear": MODULATION},
    components=("transformer", "transformer_ref"),  # of which a workflow loads one
    hosts=("MiniMaxH3ModularPipeline",),  # which is modular: diffusers has no other
    # Source: scripts/convert_minimax_h3_to_diffusers.py of diffusers, whose figures are the class's defaults.
    published=(Published("MiniMaxAI/MiniMax-H3"),),
)

SPECS = (MINIMAX_H3,)
