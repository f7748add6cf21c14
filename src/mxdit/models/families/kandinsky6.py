"""Kandinsky 6: video with sound in one transformer of fused blocks, and super-resolution in another."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

from mxdit.models.spec import MODULATION, VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """A patch is 1 x p x p latents; the pipeline takes multiples of 16."""
    return Geometry(
        multiple=lcm(16, int(vae.get("spatial_compression_ratio") or 8) * int(config["patch_size"][1])),
        temporal=int(vae.get("temporal_compression_ratio") or 4),
        positions=128,
    )


# Source of the figures: the defaults of diffusers' pipeline, and its example, which is of the distilled model: that one's
# output is wider than its latents. A result is frames alone, so no sound is asked for.
_SILENT = {"sample_audio": False}
_PRESETS = (
    Preset(
        "Kandinsky-6.0", "t2v", (512, 768), 121, 24, 50, 5.0, config={"out_visual_dim": 16}, arguments=_SILENT
    ),
    Preset("Kandinsky-6.0-distill", "t2v", (480, 864), 121, 24, 16, 1.0, arguments=_SILENT),
)  # fmt: skip

KANDINSKY6 = ModelSpec(
    title="Kandinsky 6",
    transformer="Kandinsky6Transformer3DModel",
    # Not the text's blocks (video_text_transformer_blocks, audio_text_transformer_blocks): four of each beside 60, which
    # see the text alone.
    blocks=("visual_transformer_blocks",),
    groups=(
        *(
            (f"{side}.self_attention.to_query", f"{side}.self_attention.to_key", f"{side}.self_attention.to_value")
            for side in ("video_dec_block", "audio_dec_block")
        ),
        *(
            (f"{side}.cross_attention.to_key", f"{side}.cross_attention.to_value")
            for side in ("video_dec_block", "audio_dec_block")
        ),
        # What one side asks the text with, the other side attends to.
        ("video_dec_block.cross_attention.to_query", "av_cross_attention.to_key", "av_cross_attention.to_value"),
        ("audio_dec_block.cross_attention.to_query", "va_cross_attention.to_key", "va_cross_attention.to_value"),
    ),
    keep=dict.fromkeys(
        ("*.visual_modulation.out_layer", "?a_modulation.out_layer", "?v_modulation.out_layer"), MODULATION
    ),
    pipelines={
        "Kandinsky6TI2VAPipeline": PipelineSpec(
            "t2v",
            VIDEO_CALL,
        )
    },
    needed=("num_visual_blocks", "patch_size"),
    geometry=_geometry,
    presets=_PRESETS,
    # Source: the sizes by which the release's ComfyUI nodes (kandinskylab/kandinsky-6) tell Pro, and the docstring of diffusers'
    # class; all else as that class has it.
    published=(
        Published(
            "kandinskylab/Kandinsky-6.0-Pro-5s-Diffusers",
            {
                "model_dim_a": 2048,
                "ff_dim_a": 7168,
                **dict.fromkeys(("text_token_padding", "ca_rope", "cross_gates", "fix_modulation"), True),
            },
        ),
    ),
)

KANDINSKY6_SR = ModelSpec(
    title="Kandinsky 6 super-resolution",
    transformer="Kandinsky6SRTransformer3DModel",
    blocks=("visual_transformer_blocks",),
    groups=(("self_attention.to_query", "self_attention.to_key", "self_attention.to_value"),),
    keep={"visual_modulation.out_layer": MODULATION},
    hosts=("Kandinsky6SRPipeline",),  # takes a video
    # Source: diffusers' class, whose defaults are the distilled release's.
    published=(Published("kandinskylab/Kandinsky-6.0-VSR-distilled2steps-5s-Diffusers"),),
)

SPECS = (KANDINSKY6, KANDINSKY6_SR)
