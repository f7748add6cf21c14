"""vLLM-Omni's layout of a quantized expert (0.22 to 0.30), which MindIE-SD shares: diffusers names, FP4 as values.

Its `quantization_config` becomes keyword arguments of a class, so a key that the class lacks is a TypeError there: only the
keys below may be written. Layers are named as its runtime calls them, with attn1's q, k and v fused.
Source: vllm_omni/quantization of the 0.30.0 wheel (factory.py, mxfp4_config.py, mxfp8_config.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mxdit.checkpoint.experts import Expert
from mxdit.checkpoint.layouts.numeric import unpack
from mxdit.checkpoint.writer import Part
from mxdit.config import MXConfig
from mxdit.numerics.formats import TensorInfo, block_format

SERIALIZED = {
    "mxfp4": "is_checkpoint_mxfp4_serialized",
    "mxfp4_dualscale": "is_checkpoint_serialized",
    "mxfp8": "is_checkpoint_mxfp8_serialized",
}

# What each config class takes as keyword arguments.
KEYS = {
    "mxfp4": {
        "quant_method",
        "is_checkpoint_mxfp4_serialized",
        "ignored_layers",
        "require_smooth_scale",
        "w4a8_fallback_steps",
        "w4a8_fallback_layers",
        "mxfp4_scale_alg",
    },
    "mxfp4_dualscale": {
        "quant_method",
        "is_checkpoint_serialized",
        "ignored_layers",
        "num_bf16_fallback_layers",
        "w4a8_fallback_steps",
        "w4a8_fallback_layers",
    },
    "mxfp8": {"quant_method", "is_checkpoint_mxfp8_serialized", "ignored_layers"},
}


def why_not(expert: Expert) -> str | None:
    """Why vLLM-Omni 0.30 would not load the expert, or load it wrong; None where it runs it right."""
    stored = expert.stored
    if stored.layout == "diffusers":
        return None
    if stored.layout == "original":
        return "the original layout: mxdit quantize, then mxdit convert --to vllm-omni"
    if stored.layout != "vllm-omni":
        reason = "packed codes, and config keys that it does not know" if stored.layout == "packed" else stored.layout
        return f"{reason}: mxdit convert --to vllm-omni"
    config = expert.config.get("quantization_config") or {}
    method = str(config.get("quant_method")).lower().replace("-", "_")
    unknown = [key for key in config if key not in KEYS.get(method, set())]
    if unknown:
        return f"its config for {method} takes no key {unknown[0]!r}"
    listed = set(config.get("ignored_layers") or ())
    for path, quantized in expert.methods.items():
        name = expert.spec.runtime_name(path, "vllm-omni")
        if not quantized:
            if expert.spec.place_of(path) and name not in listed:
                return f"{path} is float, and ignored_layers does not list {name}"
            continue
        if name in listed:
            return f"{path} is quantized, and ignored_layers lists {name}"
        weight, row = stored.tensors.get(f"{path}.weight"), block_format(quantized)
        if weight is None or len(weight.shape) != 2:
            continue  # a finding says so
        if weight.info.dtype is torch.uint8:
            return f"{path}.weight is uint8, which it would take for the numbers 0 to 255"
        if row.outer and f"{path}.mul_scale" not in stored.tensors:
            return f"{path}.mul_scale is missing: every dual-scale layer needs one, if of ones"
        if row.bits == 4 and row.blocks(weight.shape[1]) % 2:
            return f"{path} has {row.blocks(weight.shape[1])} scales a row, and it takes pairs"
    return None


def to_vllm_omni(expert: Expert) -> tuple[dict[str, Part], dict[str, Any], list[str]]:
    """The expert's tensors and `quantization_config` as vLLM-Omni reads them, and what of our config it cannot say."""
    config = expert.quantization
    assert config is not None
    row = block_format(config.quant_method)
    parts: dict[str, Part] = {}
    for name, part in expert.parts.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not expert.methods.get(path):
            parts[name] = part
        elif row.bits == 4:
            shape = (part.info.shape[0], part.info.shape[1] * 2)
            parts[name] = Part(TensorInfo(shape, torch.float8_e4m3fn), partial(_numeric, part))
        else:
            parts[name] = Part(TensorInfo(part.info.shape, torch.float8_e4m3fn), partial(_e4m3, part))
        if leaf == "weight" and expert.methods.get(path) and row.outer and f"{path}.mul_scale" not in expert.parts:
            # It allocates the factors without a default and never checks that a file gave them.
            ones = TensorInfo((part.info.shape[1] * row.per_byte,), torch.float32)
            parts[f"{path}.mul_scale"] = Part(ones, partial(torch.ones, ones.shape[0]))
    return parts, _config(expert, config), _lost(config)


def _config(expert: Expert, config: MXConfig) -> dict[str, Any]:
    kept = [path for path, method in expert.methods.items() if not method and expert.spec.place_of(path)]
    written: dict[str, Any] = {
        "quant_method": str(config.quant_method),
        SERIALIZED[config.quant_method]: True,
        "ignored_layers": _runtime(expert, tuple(kept)),
    }
    if config.quant_method == "mxfp4":
        written["mxfp4_scale_alg"] = config.mxfp4_scale_alg
        everything = [path for path, method in expert.methods.items() if method]
        raised = tuple(everything) if config.activation == "mxfp8" else config.w4a8_fallback_layers
        if raised:
            written["w4a8_fallback_layers"] = _runtime(expert, raised)
    return written


def _runtime(expert: Expert, paths: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(expert.spec.runtime_name(path, "vllm-omni") for path in paths))


def _lost(config: MXConfig) -> list[str]:
    lost = []
    if config.effective_activation == "bf16":
        lost.append("activation 'bf16': vLLM-Omni quantizes activations")
    elif config.quant_method == "mxfp4_dualscale" and (
        config.effective_activation != "mxfp4" or config.w4a8_fallback_layers
    ):
        lost.append("activation 'mxfp8': vLLM-Omni has it over single-scale MXFP4 only")
    if config.require_smooth_scale:
        lost.append("require_smooth_scale: vLLM-Omni's dual-scale config has no such key")
    return lost


def _numeric(part: Part) -> torch.Tensor:
    return unpack(part.read())


def _e4m3(part: Part) -> torch.Tensor:
    return part.read().view(torch.float8_e4m3fn)
