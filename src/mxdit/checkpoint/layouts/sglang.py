"""SGLang-diffusion's layout of a quantized expert: packed codes, diffusers names, and msModelSlim's description beside them.

Source: multimodal_gen of the 0.5.23 wheel (tools/wan_repack.py, layers/quantization/modelslim*.py). What it looks up under its
runtime names or needs twice is written so that its own look-ups find it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mxdit.checkpoint.experts import Expert
from mxdit.checkpoint.writer import Part
from mxdit.numerics.formats import TensorInfo

KINDS = {"mxfp4": "W4A4_MXFP4", "mxfp4_dualscale": "W4A4_MXFP4_DUALSCALE", "mxfp8": "W8A8_MXFP8"}


def why_not(expert: Expert) -> str | None:
    """Why SGLang 0.5.23 would not load the expert, or load it wrong; None where it runs it right."""
    stored, methods = expert.stored, set(expert.methods.values())
    if stored.layout == "diffusers":
        return None
    if stored.layout == "original":
        return "the original layout: mxdit quantize, then mxdit convert --to sglang"
    if stored.layout != "sglang":
        return f"{stored.layout}: mxdit convert --to sglang"
    if "mxfp4_dualscale" in methods:
        return "dual-scale weights: its loader ends in an AttributeError (is_dual_scale_key)"
    if stored.activation == "mxfp8" and "mxfp4" in methods:
        return "W4A8_MXFP: it has no such scheme"
    for path, method in expert.methods.items():
        weight = stored.tensors.get(f"{path}.weight")
        if method == "mxfp8" and weight is not None and weight.info.dtype is torch.uint8:
            return f"{path}.weight is uint8, which it would take for the numbers 0 to 255"
        if method == "mxfp4" and weight is not None and weight.info.dtype is not torch.uint8:
            return f"{path}.weight holds one value a byte, and it takes two codes"
        name = expert.spec.runtime_name(path, "sglang")
        looked_up = not method and expert.spec.looked_up(path, "sglang")
        if looked_up and (stored.description or {}).get(f"{name}.weight") != "FLOAT":
            return f"{path} is float, and the description has no FLOAT under {name}.weight, where it looks"
    return None


def to_sglang(expert: Expert) -> tuple[dict[str, Part], dict[str, Any], list[str]]:
    """The expert's tensors and description as SGLang reads them, and what of our config they cannot say."""
    config = expert.quantization
    assert config is not None
    eight = config.effective_activation == "mxfp8" and config.quant_method == "mxfp4"
    kind = "W4A8_MXFP" if eight else KINDS[config.quant_method]
    description: dict[str, Any] = {"model_quant_type": kind}
    parts: dict[str, Part] = {}
    for name, part in expert.parts.items():
        path, _, leaf = name.rpartition(".")
        method = expert.methods.get(path)
        quantized = bool(method) and leaf in ("weight", "weight_scale", "weight_dual_scale")
        if method == "mxfp8" and leaf == "weight":
            part = Part(TensorInfo(part.info.shape, torch.float8_e4m3fn), partial(_e4m3, part))
        parts[name] = part
        description[name] = kind if quantized else "FLOAT"
        if leaf == "mul_scale":
            description[f"{path}.div.mul_scale"] = "FLOAT"  # it asks for both names
        if path in expert.methods and not method and leaf == "weight":
            # It asks for a layer that stays float by its runtime name.
            description[f"{expert.spec.runtime_name(path, 'sglang')}.weight"] = "FLOAT"
    lost = []
    if config.effective_activation == "bf16" or config.w4a8_fallback_layers:
        lost.append("activation: SGLang runs every layer with the type of its weight")
    if config.quant_method == "mxfp4" and config.mxfp4_scale_alg:
        lost.append(f"mxfp4_scale_alg {config.mxfp4_scale_alg}: SGLang scales activations by 0 (OCP)")
    return parts, description, lost


def _e4m3(part: Part) -> torch.Tensor:
    return part.read().view(torch.float8_e4m3fn)
