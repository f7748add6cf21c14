"""EasyAnimate (V5.1): one transformer, whose text has weights of its own.

diffusers' class can leave those out of its last blocks (`mmdit_layers`), which then send text and video through the same FFN one
after the other. The published models have them in all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import MODULATION, VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and time between all but the first two; the pipeline cuts sizes to 16."""
    stages = len(vae.get("block_out_channels") or (128, 256, 512, 512))
    return Geometry(multiple=lcm(16, 2 ** (stages - 1) * int(config["patch_size"])), temporal=2 ** (stages - 2))


EASYANIMATE = ModelSpec(
    title="EasyAnimate V5.1",
    transformer="EasyAnimateTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        (
            "attn1.add_q_proj",
            "attn1.add_k_proj",
            "attn1.add_v_proj",
        ),  # the text's side
    ),
    # A thirteenth of the weights.
    keep=dict.fromkeys(("norm1.linear", "norm2.linear"), MODULATION),
    pipelines={
        "EasyAnimatePipeline": PipelineSpec(
            "t2v",
            VIDEO_CALL,
        )
    },
    hosts=(
        "EasyAnimateInpaintPipeline",  # I2V, by a video and its mask
        "EasyAnimateControlPipeline",
    ),
    needed=("patch_size",),
    geometry=_geometry,
    # Source of the figures: the defaults and the example of diffusers' pipeline.
    presets=(Preset("EasyAnimate V5.1", "t2v", (512, 512), 49, 8, 50, 5.0, negative_prompt="bad detailed"),),
    # Source: diffusers' class, whose docstring has the three sizes that it has no defaults for.
    published=(
        Published(
            "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers", {"in_channels": 16, "out_channels": 16, "patch_size": 2}
        ),
    ),
)

SPECS = (EASYANIMATE,)
