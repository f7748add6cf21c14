"""SGLang-diffusion's layout of a quantized component: packed codes, diffusers names, and msModelSlim's description beside them.

Source: multimodal_gen of the 0.5.23 wheel (tools/wan_repack.py, layers/quantization/modelslim*.py). What it looks up under its
runtime names or needs twice is written so that its own look-ups find it.
"""

from __future__ import annotations

from typing import Any

import torch

from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.layout import Folder, Layout, Written
from mxdit.checkpoint.layouts.description import NAMES, read_described
from mxdit.checkpoint.layouts.numeric import as_e4m3
from mxdit.checkpoint.writer import Part
from mxdit.numerics.formats import PARTS, block_format


def recognizes(folder: Folder) -> bool:
    return folder.described and not folder.original


def read(folder: Folder) -> Stored:
    return read_described(folder, SGLANG.name, lambda name: name)


def why_not(component: Component) -> str | None:
    """Why SGLang 0.5.23 would not load the component, or load it wrong; None where it runs it right."""
    stored, methods = component.stored, set(component.methods.values())
    if "mxfp4_dualscale" in methods:
        return "dual-scale weights: its loader ends in an AttributeError (is_dual_scale_key)"
    if stored.raised and "mxfp4" in methods:
        return "W4A8_MXFP: it has no such scheme"
    for path, method in component.methods.items():
        weight = stored.tensors.get(f"{path}.weight")
        if method and weight is not None:
            eight = block_format(method).bits == 8
            if eight and weight.info.dtype is torch.uint8:
                return f"{path}.weight is uint8, which it would take for the numbers 0 to 255"
            if not eight and weight.info.dtype is not torch.uint8:
                return f"{path}.weight holds one value a byte, and it takes two codes"
        said = stored.description or {}
        factors = f"{path}.mul_scale", f"{path}.div.mul_scale"
        if factors[0] in stored.tensors and not said.keys() >= {*factors}:
            return f"{path} is smoothed, and the description does not name both {factors[0]} and {factors[1]}"
        name = component.spec.runtime_name(path, SGLANG.name)
        looked_up = not method and component.spec.looked_up(path, SGLANG.name)
        if looked_up and said.get(f"{name}.weight") != "FLOAT":
            return f"{path} is float, and the description has no FLOAT under {name}.weight, where it looks"
    return None


def write(component: Component) -> Written:
    """The component's tensors and its description."""
    config = component.quantization
    assert config is not None
    eight = config.effective_activation == "mxfp8" and config.quant_method == "mxfp4"
    # It looks up the type of each layer by itself; this one is of most.
    kinds = {method: NAMES[method, "mxfp8" if eight and method == "mxfp4" else None] for method in config.methods}
    description: dict[str, Any] = {"model_quant_type": kinds[config.quant_method]}
    parts: dict[str, Part] = {}
    for name, part in component.parts.items():
        path, _, leaf = name.rpartition(".")
        method = component.methods.get(path)
        encoded = method if leaf in PARTS and leaf != "mul_scale" else None
        parts[name] = as_e4m3(part) if encoded and leaf == "weight" and block_format(encoded).bits == 8 else part
        description[name] = kinds[encoded] if encoded else "FLOAT"
        if leaf == "mul_scale":
            description[f"{path}.div.mul_scale"] = "FLOAT"  # it asks for both names
        if path in component.methods and not method and leaf == "weight":
            # It asks for a layer that stays float by its runtime name.
            description[f"{component.spec.runtime_name(path, SGLANG.name)}.weight"] = "FLOAT"
    lost = []
    if config.effective_activation == "bf16" or config.w4a8_fallback_layers:
        lost.append("activation: SGLang runs every layer with the type of its weight")
    if config.require_smooth_scale:
        lost.append("require_smooth_scale: SGLang's description has no such key")
    if config.activation_steps:
        lost.append(f"activation_steps {config.activation_steps}: SGLang runs every step alike")
    if config.mxfp4_scale_alg:
        lost.append(f"mxfp4_scale_alg {config.mxfp4_scale_alg}: SGLang scales activations by 0 (OCP)")
    return Written(parts, files={"quant_model_description.json": description}, lost=tuple(lost))


SGLANG = Layout(
    "sglang",
    recognizes,
    read,
    write,
    runtime="SGLang 0.5.23",
    why_not=why_not,
    by_runtime_names=True,
    scale_alg=0,
)
