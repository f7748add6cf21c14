"""Cosmos 3: a language model's decoder with a second set of weights in every block, for what it generates."""

from __future__ import annotations

from mxdit.models.spec import ModelSpec, Published

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
    # Its `video` is one clip and no batch of them, and its transformer is handed lists and no `timestep`.
    hosts=("Cosmos3OmniPipeline",),
    # Source: diffusers' class, whose defaults are the release's.
    published=(Published("nvidia/Cosmos3-Nano"),),
    # Source: diffusers' pipelines/cosmos/mixed_precision.py.
    recipes={
        "NVIDIA's FP8 checkpoints": "activations of the text's side at all steps, and all activations of the first and last 3"
        " steps; with mxdit that is a choice of each run (`activation_steps`)",
    },
)

SPECS = (COSMOS3,)
