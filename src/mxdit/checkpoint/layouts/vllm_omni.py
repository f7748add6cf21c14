"""vLLM-Omni's layout of a quantized component (0.22 to 0.30), which MindIE-SD shares: diffusers names, FP4 as values.

Its `quantization_config` becomes keyword arguments of a class, so a key that the class lacks is a TypeError there: only the
keys below may be written. Layers are named as its runtime calls them, with q, k and v of self-attention fused.
Source: vllm_omni/quantization of the 0.30.0 wheel (factory.py, mxfp4_config.py, mxfp8_config.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.layout import CONFIG, Folder, Layout, Written
from mxdit.checkpoint.layouts.auto_round import NAMES as AUTO_ROUND
from mxdit.checkpoint.layouts.numeric import as_e4m3, values_of
from mxdit.checkpoint.writer import Part
from mxdit.config import STEPS_OF_W4A8, MXConfig
from mxdit.errors import CheckpointError
from mxdit.models import spec_of
from mxdit.numerics.formats import FLOATS, BlockFormat, block_format

NAME = "vllm-omni"
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
        STEPS_OF_W4A8,
        "w4a8_fallback_layers",
        "mxfp4_scale_alg",
    },
    "mxfp4_dualscale": {
        "quant_method",
        "is_checkpoint_serialized",
        "ignored_layers",
        "num_bf16_fallback_layers",
        STEPS_OF_W4A8,
        "w4a8_fallback_layers",
    },
    "mxfp8": {"quant_method", "is_checkpoint_mxfp8_serialized", "ignored_layers"},
}


def recognizes(folder: Folder) -> bool:
    stated = folder.stated
    if isinstance(stated, Mapping) and ("layout" in stated or stated.get("quant_method") in AUTO_ROUND):
        return False
    return folder.named and stated is not None


def read(folder: Folder) -> Stored:
    return Stored(folder.path, NAME, folder.tensors, folder.config, _config_of(folder))


def _config_of(folder: Folder) -> MXConfig:
    """Its `quantization_config` as ours, but for its own names in `ignored_layers`, which the files decide."""
    stated, where = folder.stated, str(folder.path / CONFIG)
    if not isinstance(stated, Mapping):
        raise CheckpointError("quantization_config is no object", where=where, got=repr(stated))
    if stated.get("layer_methods"):
        raise CheckpointError(
            "vLLM-Omni's layout has one method for all layers",
            where=where,
            got="layer_methods",
            hint="Its FP4 values and MXFP8 codes look alike: bring the checkpoint into the packed layout.",
        )
    method = str(stated.get("quant_method")).lower().replace("-", "_")
    flag = SERIALIZED.get(method)
    if flag and not stated.get(flag) and not stated.get("is_checkpoint_serialized"):
        raise CheckpointError(
            "the config does not say that the weights are quantized already",
            where=where,
            got=f"{flag} {stated.get(flag)!r}",
            expected="true",
            hint="vLLM-Omni would quantize them once more. Set the key, or restore the file.",
        )
    paths: dict[str, list[str]] = {}
    for name in folder.tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            paths.setdefault(folder.spec.runtime_name(path, NAME), []).append(path)
    keys: dict[str, Any] = {k: v for k, v in stated.items() if k not in ("num_bf16_fallback_layers", "quant_method")}
    if method == "mxfp4":
        keys.setdefault("mxfp4_scale_alg", 0)  # its default
    config = MXConfig.from_dict({**keys, "quant_method": method})
    raised = [path for name in config.w4a8_fallback_layers for path in paths.get(name, [])]
    scales = {name for name in folder.tensors if name.endswith(".weight_scale")}
    if raised and {f"{path}.weight_scale" for path in raised} == scales:
        return replace(config, activation="mxfp8", w4a8_fallback_layers=())
    return replace(config, w4a8_fallback_layers=tuple(raised))


def floats(config: MXConfig, skeleton: nn.Module) -> dict[str, bool]:
    spec, listed = spec_of(skeleton), set(config.ignored_layers)
    linears = [path for path, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    return {path: spec.runtime_name(path, NAME) in listed for path in linears if spec.place_of(path)}


def filler(row: BlockFormat, leaf: str, tensor: Readable) -> bool:
    """It wants factors in every dual-scale layer; where there is no smoothing a converter writes ones.

    Single-scale layers take ones of themselves, so that ones in a file are the file's own.
    """
    factors = bool(row.outer) and leaf == "mul_scale" and tensor.info.dtype in FLOATS
    return factors and bool((tensor.read() == 1).all())


def why_not(component: Component) -> str | None:
    """Why vLLM-Omni 0.30 would not load the component, or load it wrong; None where it runs it right."""
    stored = component.stored
    config = component.config.get("quantization_config") or {}
    method = str(config.get("quant_method")).lower().replace("-", "_")
    unknown = [key for key in config if key not in KEYS.get(method, set())]
    if unknown:
        return f"its config for {method} takes no key {unknown[0]!r}"
    if method == "mxfp4_dualscale" and any(config.get(key) for key in (STEPS_OF_W4A8, "w4a8_fallback_layers")):
        return "W4A8 over dual-scale weights: it refuses them"
    listed = set(config.get("ignored_layers") or ())
    for path, quantized in component.methods.items():
        name = component.spec.runtime_name(path, NAME)
        if not quantized:
            if component.spec.place_of(path) and name not in listed:
                return f"{path} is float, and ignored_layers does not list {name}"
            continue
        if name in listed:
            return f"{path} is quantized, and ignored_layers lists {name}"
        weight, row = stored.tensors.get(f"{path}.weight"), block_format(quantized)
        if weight is None or len(weight.info.shape) != 2:
            continue  # a fault says so
        if weight.info.dtype is torch.uint8:
            return f"{path}.weight is uint8, which it would take for the numbers 0 to 255"
        if f"{path}.mul_scale" not in stored.tensors:
            if row.outer:
                return f"{path}.mul_scale is missing: every dual-scale layer needs one, if of ones"
            if config.get("require_smooth_scale"):
                return f"{path}.mul_scale is missing, and require_smooth_scale asks for it"
        if row.bits == 4 and row.blocks(weight.info.shape[1]) % 2:
            return f"{path} has {row.blocks(weight.info.shape[1])} scales a row, and it takes pairs"
    return None


def write(component: Component) -> Written:
    """The component's tensors and `quantization_config`, with ones for the factors of dual-scale layers that were not smoothed.

    It allocates those without a default and never checks that a file gave them.
    """
    config = component.quantization
    assert config is not None
    row = block_format(config.quant_method)
    parts: dict[str, Part] = {}
    for name, part in component.parts.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not component.methods.get(path):
            parts[name] = part
            continue
        parts[name] = values_of(part) if row.bits == 4 else as_e4m3(part)
        if row.outer and f"{path}.mul_scale" not in component.parts:
            n, k = part.info.shape[0], part.info.shape[1] * row.per_byte
            ones = row.tensors(n, k, smooth=True)["mul_scale"]
            parts[f"{path}.mul_scale"] = Part(ones, partial(torch.ones, ones.shape, dtype=ones.dtype))
    return Written(parts, _config(component, config), lost=tuple(_lost(config)))


def _config(component: Component, config: MXConfig) -> dict[str, Any]:
    written: dict[str, Any] = {
        "quant_method": str(config.quant_method),
        SERIALIZED[config.quant_method]: True,
        "ignored_layers": _runtime(component, component.kept),
    }
    if config.quant_method == "mxfp4":
        written["mxfp4_scale_alg"] = config.mxfp4_scale_alg
        if config.require_smooth_scale:
            written["require_smooth_scale"] = True
        everything = [path for path, method in component.methods.items() if method]
        raised = everything if config.activation == "mxfp8" else config.w4a8_fallback_layers
        if raised:
            written["w4a8_fallback_layers"] = _runtime(component, raised)
        steps = config.activation_steps.activations.get("mxfp8") if config.activation_steps else None
        if steps:
            written[STEPS_OF_W4A8] = list(steps)
    return written


def _runtime(component: Component, paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(component.spec.runtime_name(path, NAME) for path in paths))


def _lost(config: MXConfig) -> list[str]:
    lost = []
    if config.effective_activation == "bf16":
        lost.append("activation 'bf16': vLLM-Omni quantizes activations")
    elif config.quant_method == "mxfp4_dualscale" and (
        config.effective_activation != "mxfp4" or config.w4a8_fallback_layers
    ):
        lost.append("activation 'mxfp8': vLLM-Omni has it over single-scale MXFP4 only")
    policy = config.activation_steps
    if policy and config.quant_method != "mxfp4":
        lost.append(f"activation_steps {policy}: vLLM-Omni has steps over single-scale MXFP4 only")
    elif policy:
        others = [name for name in policy.activations if name != "mxfp8"]
        if others:
            lost.append(f"activation_steps in {' and '.join(others)}: vLLM-Omni's steps are in 'mxfp8'")
        if policy.of is not None:
            lost.append(f"activation_steps of {policy.of} steps: vLLM-Omni takes them in a request of any number")
    if config.require_smooth_scale and config.quant_method == "mxfp4_dualscale":
        lost.append("require_smooth_scale: vLLM-Omni's dual-scale config has no such key")
    return lost


VLLM_OMNI = Layout(
    NAME,
    recognizes,
    read,
    write,
    runtime="vLLM-Omni 0.30",
    plugin="vLLM-Omni 0.30 with mxdit",
    why_not=why_not,
    by_runtime_names=True,
    mixed=False,
    floats=floats,
    filler=filler,
)
