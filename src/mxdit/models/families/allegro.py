"""Allegro: one transformer, whose modulations are tables in its blocks and one linear outside of them."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

ALLEGRO = ModelSpec(
    title="Allegro",
    transformer="AllegroTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),  # of the text
    ),
    # Its VAE decodes in tiles of 24 x 320 x 320 only, and only where somebody turns tiling on, which no request does.
    hosts=("AllegroPipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("rhymes-ai/Allegro"),),
)

SPECS = (ALLEGRO,)
