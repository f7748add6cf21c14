"""Wan Animate (2.2) and Wan Animate 2: a character's image that moves as a pose or a driving video does."""

from __future__ import annotations

from mxdit.models.families.wan import WAN
from mxdit.models.spec import ModelSpec, Published

WAN_ANIMATE = ModelSpec(
    title="Wan Animate",
    transformer="WanAnimateTransformer3DModel",
    # A block of the second list runs after each fifth of the first. The encoders of motion and face that feed it are
    # convolutions and layers of their own kind, and small.
    blocks=("blocks", "face_adapter"),
    sequential=False,  # an adapter runs after every fifth block
    groups=(
        *WAN.groups,
        ("to_k", "to_v"),  # of the face's features, in face_adapter
    ),
    hosts=("WanAnimatePipeline",),  # it takes a pose video and a face video
    # Source: diffusers' scripts/convert_wan_to_diffusers.py; all else as its class has it.
    published=(Published("Wan-AI/Wan2.2-Animate-14B-Diffusers", {"added_kv_proj_dim": 5120}),),
)
WAN_ANIMATE_2 = ModelSpec(
    title="Wan Animate 2",
    transformer="WanAnimate2Transformer3DModel",
    blocks=("blocks",),
    groups=(
        ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"),
        ("cross_attn.to_k", "cross_attn.to_v"),
        ("cross_attn.add_k_proj", "cross_attn.add_v_proj"),  # the character's image
    ),
    # Modular pipelines only, which take a driving video.
    hosts=("WanAnimate2ModularPipeline", "WanAnimate2DistilledModularPipeline"),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("Wan-AI/Wan2.2-Animate-2-14B-Diffusers"),),
)

SPECS = (WAN_ANIMATE, WAN_ANIMATE_2)
