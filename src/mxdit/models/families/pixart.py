"""PixArt (alpha and sigma): one transformer with the text in cross-attention, which makes images."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import IMAGE_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages, and a patch is p x p latents; the pipelines take multiples of 8."""
    stages = len(vae.get("block_out_channels") or (1, 2, 4, 4))
    return Geometry(multiple=lcm(8, 2 ** (stages - 1) * int(config["patch_size"])))


_PIPELINE = PipelineSpec(
    "t2i",
    IMAGE_CALL,
    output="images",
)

# Source of the figures: the defaults of diffusers' pipelines, and the sizes that the models are named by. The size that is asked
# for is the one that is computed: by itself a pipeline takes the nearest of a table and scales what it made.
_ASKED = {"use_resolution_binning": False}
_PRESETS = tuple(
    Preset(
        f"PixArt-{8 * sample}", "t2i", (8 * sample, 8 * sample), 1, 1, 20, 4.5,
        config={} if sample == 128 else {"sample_size": sample}, arguments=_ASKED,
    )
    for sample in (32, 64, 256, 128)
)  # fmt: skip

PIXART = ModelSpec(
    title="PixArt",
    transformer="PixArtTransformer2DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    pipelines={"PixArtAlphaPipeline": _PIPELINE, "PixArtSigmaPipeline": _PIPELINE},
    hosts=("PixArtSigmaPAGPipeline",),
    needed=("num_layers", "patch_size", "sample_size"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: scripts/convert_pixart_alpha_to_diffusers.py and convert_pixart_sigma_to_diffusers.py of diffusers; all else as
    # diffusers' class has it.
    published=(
        Published("PixArt-alpha/PixArt-XL-2-1024-MS", {"caption_channels": 4096}),
        Published(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", {"caption_channels": 4096, "use_additional_conditions": False}
        ),
    ),
)

SPECS = (PIXART,)
