"""HiDream-I1: two lists of blocks whose feed-forward for the image is a mixture of experts."""

from __future__ import annotations

from operator import itemgetter

from mxdit.models.spec import MODULATION, ModelSpec, Published

_EXPERTS = 4  # of each block, in every published model; two of them see a token

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
    # Not in `pipelines`: it makes another size of the one that it is asked for, with the area of 128 x 128 latents.
    hosts=("HiDreamImagePipeline",),
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
