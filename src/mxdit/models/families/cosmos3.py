"""Cosmos 3: a language model's decoder with a second set of weights in every block, for what it generates."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from mxdit.models.spec import VIDEO_CALL, Geometry, ModelSpec, PipelineSpec, Preset, Published


def _geometry(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """The strides are in the VAE's config; latents that fill no patch are filled up."""
    return Geometry(multiple=int(vae["scale_factor_spatial"]), temporal=int(vae["scale_factor_temporal"]))


COSMOS3 = ModelSpec(
    title="Cosmos 3",
    transformer="Cosmos3OmniTransformer",
    blocks=("layers",),
    groups=(
        ("self_attn.to_q", "self_attn.to_k", "self_attn.to_v"),  # the text's side
        ("self_attn.add_q_proj", "self_attn.add_k_proj", "self_attn.add_v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),  # the text's side; a model of relu2 has no gates
        ("mlp_moe_gen.gate_proj", "mlp_moe_gen.up_proj"),
    ),
    timestep=itemgetter("vision_timesteps"),
    pipelines={
        "Cosmos3OmniPipeline": PipelineSpec(
            "t2v",
            {**VIDEO_CALL, "fps": "fps"},
            output="video",
            single=True,
            makes={"safety_checker": "cosmos_guardrail"},
        )
    },
    geometry=_geometry,
    # Source: the defaults of diffusers' pipeline.
    presets=(Preset("Cosmos 3", "t2v", (720, 1280), 189, 24, 35, 6.0),),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("nvidia/Cosmos3-Nano"),),
    # Source: diffusers' pipelines/cosmos/mixed_precision.py.
    recipes={
        "NVIDIA's FP8 checkpoints": "activations of the text's side at all steps, and all activations of the first and last 3"
        " steps; with mxdit that is a choice of each run (`activation_steps`)",
    },
)

SPECS = (COSMOS3,)
