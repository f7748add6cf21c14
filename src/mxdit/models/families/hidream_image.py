"""HiDream-I1: two lists of blocks whose feed-forward for the image is a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm, sqrt
from operator import itemgetter
from typing import Any

from mxdit.models.spec import IMAGE_CALL, MODULATION, Geometry, ModelSpec, PipelineSpec, Preset, Published

_EXPERTS = 4  # of each block, in every published model; two of them see a token


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The VAE halves the image between its stages. The pipeline makes every image as large as one of 128 x 128 latents."""
    stride = 2 ** (len(vae.get("block_out_channels") or (1, 2, 4, 4)) - 1)
    step = 2 * stride  # what it cuts both sides to, whatever a patch is

    def scaled(height: int, width: int) -> tuple[int, int]:
        scale = sqrt((128 * stride) ** 2 / (width * height))
        return int(height * scale // step * step), int(width * scale // step * step)

    return Geometry(multiple=lcm(step, stride * int(config["patch_size"])), scaled=scaled)


HIDREAM_IMAGE = ModelSpec(
    title="HiDream-I1",
    transformer="HiDreamImageTransformer2DModel",
    blocks=("double_stream_blocks", "single_stream_blocks"),
    # Experts are linears of their own, which see the tokens that are routed to them. The router (`ff_i.gate`) is a
    # parameter and no linear: it stays.
    groups=(
        ("block.attn1.to_q", "block.attn1.to_k", "block.attn1.to_v"),
        # The text's side, in the double blocks only.
        ("block.attn1.to_q_t", "block.attn1.to_k_t", "block.attn1.to_v_t"),
        ("block.ff_i.shared_experts.w1", "block.ff_i.shared_experts.w3"),
        *((f"block.ff_i.experts.{i}.w1", f"block.ff_i.experts.{i}.w3") for i in range(_EXPERTS)),
        ("block.ff_t.w1", "block.ff_t.w3"),
    ),
    keep={"block.adaLN_modulation.1": MODULATION},
    timestep=itemgetter("timesteps"),
    # The release comes without the fourth text encoder, Llama 3.1: a directory for mxdit has to hold it.
    pipelines={"HiDreamImagePipeline": PipelineSpec("t2i", IMAGE_CALL, output="images")},
    needed=("num_layers", "patch_size"),
    geometry=_geometry,
    # Source of the figures: the defaults of diffusers' pipeline.
    presets=(Preset("HiDream-I1", "t2i", (1024, 1024), 1, 1, 50, 5.0),),
    # Source: the release's transformer/config.json, as ComfyUI's model detection repeats it.
    published=(
        Published(
            "HiDream-ai/HiDream-I1-Full",
            {
                "patch_size": 2,
                "in_channels": 16,
                "caption_channels": [4096, 4096],
                "axes_dims_rope": [64, 32, 32],
                "max_resolution": [128, 128],
                "llama_layers": [*range(32), *[31] * 16],
            },
        ),
    ),
)

SPECS = (HIDREAM_IMAGE,)
