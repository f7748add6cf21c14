"""A quantized checkpoint in another layout: what `mxdit convert` runs. One tensor at a time is read, converted and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.component import Component
from mxdit.checkpoint.layout import Layout, Written
from mxdit.checkpoint.layouts import LAYOUTS, TARGETS
from mxdit.checkpoint.layouts.packed import PACKED
from mxdit.checkpoint.plan import SHARD, CheckpointPlan, ComponentPlan
from mxdit.checkpoint.sources import is_packed, open_both, rest_of
from mxdit.checkpoint.writer import Part, check_destination, shards_of
from mxdit.errors import CheckpointError, InputError
from mxdit.numerics.formats import TensorInfo


def convert_checkpoint(
    source: Path | Mapping[str, Path],
    destination: Path,
    to: str,
    *,
    base: Path | None = None,
    fallback_from_base: bool = False,
    allow_loss: bool = False,
    shard_size: int = SHARD,
    variant: str | None = None,
) -> CheckpointPlan:
    """Plan a quantized checkpoint in another layout; `.write()` carries it out.

    Args:
        source: a quantized checkpoint in any layout: msModelSlim's (packed or numeric, wrapped or not), vLLM-Omni's,
            SGLang's, AutoRound's, ours, or single files of ComfyUI's with MXFP8 layers: one, or component -> file.
        destination: a directory that does not exist.
        to: one of `layouts.TARGETS`: "packed", "vllm-omni", "sglang" or "modelslim".
        base: the unquantized model, for what `source` lacks: config.json, text encoder, VAE, and layers.
        fallback_from_base: take layers of another method than the rest, and smoothed float ones, from `base`.
        allow_loss: go on where the destination's format cannot say everything.
        shard_size: most bytes of a file.
        variant: of the weight files of `source`, of `base` or of both, as diffusers' `variant=`; None takes the plain ones,
            or the one that there is.

    Raises InputError, ConfigError and CheckpointError for what cannot be done, before anything is written.
    """
    if to not in TARGETS:
        raise InputError("no such layout", field="to", got=repr(to), expected=", ".join(TARGETS))
    if fallback_from_base and base is None:
        raise InputError("no base is named to keep layers from", field="fallback_from_base")
    check_destination(destination)
    opened, under = open_both(source, base, variant)
    layout, planned, lost, quantized = LAYOUTS[to], [], [], False
    for name in opened.components:
        # A file is whole: what it lacks is not filled in, and the base may be a pipeline without these weights.
        stored_base = under.read(name) if under is not None and (fallback_from_base or not opened.files) else None
        component = read_component(opened.read(name), stored_base, fallback=fallback_from_base)
        component.require_sound()
        component = replace(component, parts={tensor: _half(component, tensor) for tensor in component.parts})
        quantized |= any(component.methods.values())
        made = _written(component, layout)
        config = {key: value for key, value in component.config.items() if key != "quantization_config"}
        if made.quantization is not None:
            config["quantization_config"] = dict(made.quantization)
        shards = shards_of(made.parts, shard_size, made.stem)
        folder = layout.folder(component.spec, opened.components, name)
        planned.append(ComponentPlan(folder, config, shards, made.files, component.methods, component.reads, made.stem))
        lost += [f"{name or 'expert'}: {item}" for item in (*component.lost, *made.lost)]
    rest = opened if opened.pipeline or under is None else under
    if layout is not PACKED and not layout.as_released:
        # transformers passes over a method that it does not know, and takes the codes for numbers.
        packed = [name for name, folder in rest.encoders.items() if is_packed(folder)]
        lost += [
            f"{name}: its packed weights, which transformers without mxdit would read as numbers" for name in packed
        ]
    if not quantized:
        raise CheckpointError(
            "the checkpoint is not quantized", where=str(opened.path), hint="mxdit quantize does that."
        )
    if lost and not allow_loss:
        raise InputError(
            f"{len(lost)} thing{'s' * (len(lost) > 1)} would be lost",
            where=f"convert --to {to}",
            got="; ".join(lost),
            hint="Add --allow-loss to go on without them.",
        )
    carried, files = ({}, {}) if layout.as_released else rest_of(rest)
    return CheckpointPlan(opened.path, destination, planned, carried, files, tuple(lost))


def _half(component: Component, name: str) -> Part:
    """A tensor as it is written: what was decoded and stays float, in BF16."""
    part = component.parts[name]
    if name not in component.stored.decoded or part.info.dtype is not torch.float32:
        return part
    return Part(TensorInfo(part.info.shape, torch.bfloat16), lambda: part.read().to(torch.bfloat16))


def _written(component: Component, layout: Layout) -> Written:
    unknown = layout.unknown(component.spec)
    if unknown:
        field = "original" if layout.as_released else "runtimes"
        raise InputError(
            unknown,
            where=f"convert --to {layout.name}",
            hint=f"Use the packed layout, or give them in `{field}` of the family's ModelSpec (docs/adapting-a-model.md). "
            "docs/supported-models.md says whose are known.",
        )
    if reason := layout.unmixed(component.methods):
        raise InputError(
            reason,
            where=f"convert --to {layout.name}",
            hint="Stay with the packed layout, or keep the layers of the rarer method in BF16: --base with the unquantized "
            "model, and --fallback-from-base.",
        )
    if layout.write is None or (component.quantization is None and not layout.as_released):
        return Written(component.parts)  # a component of a cascade that was left float is float in every layout
    return layout.write(component)
