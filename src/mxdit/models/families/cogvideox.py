"""CogVideoX (1.0 and 1.5; T2V and I2V): one transformer, one sequence of text and video."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

_5B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}

COGVIDEOX = ModelSpec(
    title="CogVideoX",
    transformer="CogVideoXTransformer3DModel",
    blocks=("transformer_blocks",),
    groups=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    keep=dict.fromkeys(("norm1.linear", "norm2.linear"), MODULATION),
    hosts=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    # Source: diffusers' class, whose defaults are those of the 2B, and its convert_cogvideox_to_diffusers.py.
    published=(Published("THUDM/CogVideoX-2b"), Published("THUDM/CogVideoX-5b", _5B)),
)

SPECS = (COGVIDEOX,)
