"""ChronoEdit: Wan 2.1's I2V blocks, and positions that let a clip be its first and last latent frame alone."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import IMAGE_CALL, ModelSpec, PipelineSpec, Preset, Published

_CALL = {**IMAGE_CALL, "image": "image"}

# Source of the figures: diffusers' example and its pipeline, which makes 5 frames whatever is asked for, unless it is to
# reason over more of them first.
_PRESETS = (Preset("ChronoEdit", "i2v", (720, 1280), 5, 16, 50, 5.0),)


CHRONOEDIT = ModelSpec(
    title="ChronoEdit",
    transformer="ChronoEditTransformer3DModel",
    blocks=("blocks",),
    groups=WAN.groups,
    # An edit is a clip from the image to what the prompt makes of it.
    pipelines={
        "ChronoEditPipeline": PipelineSpec(
            "i2v", _CALL, embeddings=("prompt_embeds", "negative_prompt_embeds"), float32=("vae",)
        )
    },
    needed=WAN.needed,
    geometry=WAN.geometry,
    presets=_PRESETS,
    # It was trained from Wan2.1-I2V-14B and has its sizes.
    published=(
        Published("nvidia/ChronoEdit-14B-Diffusers", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    ),
)

SPECS = (CHRONOEDIT,)
