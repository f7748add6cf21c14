"""Fibo 2.0: one sequence of image and gist of the text, which some blocks read once more."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

BRIA_FIBO2 = ModelSpec(
    title="Fibo 2.0",
    transformer="BriaFibo2Transformer2DModel",
    # Not `perceiver.layers`: two blocks that see the text alone, and whose output every layer takes.
    blocks=("noise_refiner", "layers"),
    groups=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("cross_attention.to_k", "cross_attention.to_v"),  # in the layers that read the text
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    keep={"adaLN_modulation.0": MODULATION},
    # Not in `pipelines`, for want of a tiny one: it needs Qwen3-VL and its processor.
    hosts=("BriaFibo2Pipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("briaai/Fibo-2.0-dev"),),
)

SPECS = (BRIA_FIBO2,)
