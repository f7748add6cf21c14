"""Kandinsky 5 (T2V, I2V, T2I; Lite and Pro): one transformer, whose latents have their channels last."""

from __future__ import annotations

from mxdit.models.spec import MODULATION, ModelSpec, Published

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
    hosts=("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"),
    published=(
        Published("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", _LITE),
        Published("kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers", _PRO),
        Published("kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers", _PRO),
        Published("kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", _T2I),
    ),
)

SPECS = (KANDINSKY5,)
