"""Fibo 2.0: one sequence of image and gist of the text, which some blocks read once more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and a patch is p x p latents, with a place in a table; the pipeline takes
    multiples of 2 x 2 latents."""
    stride = 2 ** (len(vae.get("block_out_channels") or (1, 2, 4, 4)) - 1)
    return Geometry(multiple=stride * lcm(2, int(config["patch_size"])), positions=min(config["axes_lens"][1:]))


# Source of the figures and of the caption without a value, which the model was trained to be guided away from: diffusers'
# pipeline and its defaults.
_KEYS = {
    "short_description": "", "objects": [], "background_setting": "", "lighting": {}, "aesthetics": {},
    "photographic_characteristics": {}, "style_medium": "", "context": "", "artistic_style": "",
}  # fmt: skip
_PRESETS = (
    Preset(
        "Fibo-2.0", "t2i", (1024, 1024), 1, 1, 30, 5.0, negative_prompt=json.dumps(_KEYS, separators=(",", ":"))
    ),
)  # fmt: skip

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
    pipelines={"BriaFibo2Pipeline": PipelineSpec("t2i", IMAGE_CALL, output="images")},
    needed=("patch_size", "axes_lens"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("briaai/Fibo-2.0-dev"),),
)

SPECS = (BRIA_FIBO2,)
