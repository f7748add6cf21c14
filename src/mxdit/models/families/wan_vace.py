"""Wan VACE (2.1): Wan's blocks, and a second list of them that follows a video, a mask and reference images."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import ModelSpec, Preset, Published

# Source of the figures: diffusers' pipeline, its defaults and its example. It has flow shift 3.0 for 480p and 5.0 for 720p.
_PRESETS = (Preset("Wan-VACE", "t2v", (480, 832), 81, 16, 50, 5.0),)

# Source: diffusers' scripts/convert_wan_to_diffusers.py; all else as its class has it.
_1B_SIZES = {
    "num_layers": 30,
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "vace_layers": tuple(range(0, 30, 2)),
}


WAN_VACE = ModelSpec(
    title="Wan VACE",
    transformer="WanVACETransformer3DModel",
    blocks=("vace_blocks", "blocks"),  # the first make what is added after some of the second, before those run
    sequential=False,  # what each of them makes is added
    groups=WAN.groups,
    components=("transformer", "transformer_2"),
    # Without a video to follow it makes one of the text alone; what it follows is no part of a request.
    pipelines={"WanVACEPipeline": WAN.pipelines["WanPipeline"]},
    needed=WAN.needed,
    geometry=WAN.geometry,
    presets=_PRESETS,
    published=(
        Published("Wan-AI/Wan2.1-VACE-14B-diffusers"),
        Published("Wan-AI/Wan2.1-VACE-1.3B-diffusers", _1B_SIZES),
    ),
)

SPECS = (WAN_VACE,)
