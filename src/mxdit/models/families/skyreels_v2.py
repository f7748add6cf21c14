"""SkyReels V2 (T2V, I2V, diffusion forcing): Wan 2.1's blocks in a class of their own."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import VIDEO_CALL, ModelSpec, PipelineSpec, Preset, Published

_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds")
_FLOAT32 = ("vae",)  # as diffusers' examples load it

# Source: diffusers' scripts/convert_skyreelsv2_to_diffusers.py; all else as its class has it.
_14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
_1B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_I2V = {"in_channels": 36, "image_dim": 1280}
_RELEASES = (
    Published("Skywork/SkyReels-V2-T2V-14B-720P-Diffusers", _14B),
    Published("Skywork/SkyReels-V2-I2V-14B-720P-Diffusers", {**_14B, **_I2V, "added_kv_proj_dim": 5120}),
    Published("Skywork/SkyReels-V2-I2V-1.3B-540P-Diffusers", {**_1B, **_I2V, "added_kv_proj_dim": 1536}),
    Published("Skywork/SkyReels-V2-DF-14B-720P-Diffusers", _14B),
    Published("Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers", {**_1B, "inject_sample_info": True}),
)

# Source of the figures: the defaults of diffusers' pipelines and their examples, which set the flow shift.
_PRESETS = (
    Preset("SkyReels-V2-T2V-14B", "t2v", (544, 960), 97, 24, 50, 6.0, flow_shift=8.0, config=_14B),
    Preset("SkyReels-V2-I2V-14B", "i2v", (544, 960), 97, 24, 50, 5.0, flow_shift=5.0, config=_14B),
    Preset("SkyReels-V2-I2V-1.3B", "i2v", (544, 960), 97, 24, 50, 5.0, flow_shift=5.0, config=_1B),
    # Any other model of the family, with the scheduler as its directory has it.
    Preset("SkyReels-V2", "t2v", (544, 960), 97, 24, 50, 6.0),
    Preset("SkyReels-V2", "i2v", (544, 960), 97, 24, 50, 5.0),
)


SKYREELS_V2 = ModelSpec(
    title="SkyReels V2",
    transformer="SkyReelsV2Transformer3DModel",
    blocks=("blocks",),
    groups=WAN.groups,
    pipelines={
        "SkyReelsV2Pipeline": PipelineSpec("t2v", VIDEO_CALL, embeddings=_EMBEDDINGS, float32=_FLOAT32),
        "SkyReelsV2ImageToVideoPipeline": PipelineSpec(
            "i2v", {**VIDEO_CALL, "image": "image"}, embeddings=_EMBEDDINGS, float32=_FLOAT32
        ),
    },
    # Diffusion forcing: a schedule for each latent frame, with a history to go on from.
    hosts=(
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    needed=WAN.needed,
    geometry=WAN.geometry,
    presets=_PRESETS,
    published=_RELEASES,
)

SPECS = (SKYREELS_V2,)
