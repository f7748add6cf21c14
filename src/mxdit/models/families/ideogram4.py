"""Ideogram 4: two transformers, one that reads the prompt and one that does not, which guide together at every step."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

IDEOGRAM4 = ModelSpec(
    title="Ideogram 4",
    transformer="Ideogram4Transformer2DModel",
    blocks=("layers",),
    groups=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    keep={"adaln_modulation": MODULATION},
    components=("transformer", "unconditional_transformer"),
    timestep=lambda given: 1 - given["timestep"],  # it rises in the call
    # Not in `pipelines`: it calls both transformers at every step, and those of a request take turns.
    hosts=("Ideogram4Pipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("ideogram-ai/ideogram-v4", transformers=2),),
)

SPECS = (IDEOGRAM4,)
