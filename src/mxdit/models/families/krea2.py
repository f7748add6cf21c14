"""Krea 2: one sequence of text and image, after a small transformer that fuses layers of the text encoder."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

KREA2 = ModelSpec(
    title="Krea 2",
    transformer="Krea2Transformer2DModel",
    # Not `text_fusion`: four small blocks that see the text alone, and whose output every block takes. The timestep is turned
    # into shifts and gates once, before the blocks: no linear of a block is a modulation.
    blocks=("transformer_blocks",),
    groups=(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate"), ("ff.gate", "ff.up")),
    hosts=("Krea2Pipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("krea/Krea-2-Raw"),),
)

SPECS = (KREA2,)
