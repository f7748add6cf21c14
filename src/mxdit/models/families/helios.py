"""Helios (Base, Mid, Distilled): Wan's blocks, which see the frames before at three sizes."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import ModelSpec, Published

HELIOS = ModelSpec(
    title="Helios",
    transformer="HeliosTransformer3DModel",
    blocks=("blocks",),
    groups=WAN.groups[:2],  # no image branch
    # They make whole sections of 33 frames, each with a schedule of its own: what no request can count.
    hosts=("HeliosPipeline", "HeliosPyramidPipeline"),
    # Source: diffusers' class, whose sizes are the release's.
    published=(Published("BestWishYsh/Helios-Base"), Published("BestWishYsh/Helios-Distilled")),
)

SPECS = (HELIOS,)
