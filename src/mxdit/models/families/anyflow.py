"""AnyFlow: Wan 2.1 distilled to go from any timestep to any other, whole clips at once or (FAR) chunk after chunk."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import VIDEO_CALL, ModelSpec, PipelineSpec, Preset, Published

# Source of the figures: the defaults of diffusers' pipeline, and its example for the steps and the frames a second.
_PRESETS = (Preset("AnyFlow", "t2v", (480, 832), 81, 16, 4, 1.0),)

# Source: diffusers' scripts/convert_anyflow_to_diffusers.py, which starts from Wan2.1's transformers of these sizes.
_1B_SIZES = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}


ANYFLOW = ModelSpec(
    title="AnyFlow",
    transformer="AnyFlowTransformer3DModel",
    blocks=("blocks",),
    groups=WAN.groups[:2],  # no image branch
    pipelines={
        "AnyFlowPipeline": PipelineSpec(
            "t2v", VIDEO_CALL, embeddings=("prompt_embeds", "negative_prompt_embeds"), float32=("vae",)
        )
    },
    needed=WAN.needed,
    geometry=WAN.geometry,
    presets=_PRESETS,
    published=(
        Published("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers"),
        Published("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", _1B_SIZES),
    ),
)

ANYFLOW_FAR = ModelSpec(
    title="AnyFlow FAR",
    transformer="AnyFlowFARTransformer3DModel",
    blocks=("blocks",),
    groups=WAN.groups[:2],
    hosts=("AnyFlowFARPipeline",),  # a chunk is a run of the schedule of its own, and their sizes are part of its call
    published=(
        Published("nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers"),
        Published("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", _1B_SIZES),
    ),
)

SPECS = (ANYFLOW, ANYFLOW_FAR)
