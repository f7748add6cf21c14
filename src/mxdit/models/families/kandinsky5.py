"""Kandinsky 5 (T2V, I2V, T2I; Lite and Pro): one transformer, whose latents have their channels last."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import MODULATION, VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A patch is 1 x p x p latents; sparse attention takes 8 x 8 patches at once, and the pipelines multiples of 16."""
    patch = int(vae.get("spatial_compression_ratio") or 8) * int(config["patch_size"][1])
    return Geometry(
        multiple=lcm(16, patch * 8 if config["attention_type"] == "nabla" else patch),
        temporal=int(vae.get("temporal_compression_ratio") or 4),
        positions=128,
    )


# Source of the figures: the examples of diffusers' pipelines.
_PRESETS = tuple(Preset("Kandinsky-5.0", task, (512, 768), 121, 24, 50, 5.0) for task in ("t2v", "i2v"))

# Source: the configs of the releases' own repository (config_5s_sft.yaml, k5_pro_t2v_5s_sft_sd.yaml, config_t2i.yaml of
# kandinskylab/kandinsky-5); all else as diffusers' class has it.
_LATENTS = {"in_visual_dim": 16, "out_visual_dim": 16}
_LITE = {**_LATENTS, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True}
_PRO = {
    **_LATENTS, "model_dim": 4096, "ff_dim": 16384, "time_dim": 1024, "num_text_blocks": 4, "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48), "visual_cond": True,
}  # fmt: skip
_T2I = {**_LATENTS, "model_dim": 2560, "ff_dim": 10240, "num_visual_blocks": 50, "axes_dims": (32, 48, 48)}


KANDINSKY5 = ModelSpec(
    title="Kandinsky 5",
    transformer="Kandinsky5Transformer3DModel",
    # Not the text's blocks (text_transformer_blocks): two to four beside 32 to 60, which see the text alone.
    blocks=("visual_transformer_blocks",),
    groups=(
        ("self_attention.to_query", "self_attention.to_key", "self_attention.to_value"),
        ("cross_attention.to_key", "cross_attention.to_value"),
    ),
    keep={"visual_modulation.out_layer": MODULATION},
    pipelines={
        "Kandinsky5T2VPipeline": PipelineSpec("t2v", VIDEO_CALL),
        "Kandinsky5I2VPipeline": PipelineSpec("i2v", {**VIDEO_CALL, "image": "image"}),
    },
    # Of images: one takes the nearest of seven sizes of a million pixels instead of what it is asked for, the other edits.
    hosts=("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
    needed=("num_visual_blocks", "patch_size", "attention_type"),
    geometry=_geometry,
    presets=_PRESETS,
    published=(
        Published("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", _LITE),
        Published("kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers", _PRO),
        Published("kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers", _PRO),
        Published("kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", _T2I),
    ),
)

SPECS = (KANDINSKY5,)
