"""LTX-2 (2.0 to 2.5): one transformer of two streams, video and sound, that attend to each other in every block."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

_STREAMS = ("", "audio_")  # of the video and of the sound
_CROSS = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

LTX2 = ModelSpec(
    title="LTX-2",
    transformer="LTX2VideoTransformer3DModel",
    blocks=("transformer_blocks",),
    # The gate of each head, from LTX-2.3 on, reads what the query reads.
    groups=(
        *(tuple(f"{stream}attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_gate_logits")) for stream in _STREAMS),
        *((f"{attention}.to_q", f"{attention}.to_gate_logits") for attention in _CROSS),
        *((f"{attention}.to_k", f"{attention}.to_v") for attention in _CROSS),
    ),
    hosts=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",  # images and videos, each at a frame of its own
        "LTX2InContextPipeline",  # a video to follow
        "LTX2HDRPipeline",  # a video to make brighter
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
    ),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Lightricks/LTX-2"),),
)

SPECS = (LTX2,)
