"""What a checkpoint's directory is, what is wrong with it, and who can load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.component import Component, Fault, counted, faults_of
from mxdit.checkpoint.layout import Layout
from mxdit.checkpoint.layouts import LAYOUTS
from mxdit.checkpoint.layouts.packed import PACKED
from mxdit.checkpoint.loras import merged_into
from mxdit.checkpoint.sources import is_packed, open_both
from mxdit.config.steps import StepPolicy
from mxdit.models import TEXT_ENCODERS

ENCODERS = "transformers + mxdit"  # who loads a text encoder, in a pipeline of diffusers or alone


@dataclass(frozen=True)
class ComponentInspection:
    """One component.

    component  its name in the pipeline, "" where the directory is the component.
    layout     name of the layout that it is stored in.
    linears    method, or "float" -> how many linears.
    kept       float linears inside the blocks of a quantized component: what quantizing passed over.
    nbytes     of its tensors on disk.
    faults     what is wrong.
    notes      what a conversion would lose.
    about      what a single file is, in sentences.
    loaders    runtime -> None where it can load the component, else why not.
    activation_steps  what its config says activations are at some steps, if it does.
    loras      file, sha256 and scale of each LoRA that its config says was merged into it.
    """

    component: str
    layout: str
    linears: dict[str, int]
    kept: tuple[str, ...]
    nbytes: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    about: tuple[str, ...]
    loaders: dict[str, str | None]
    activation_steps: StepPolicy | None
    loras: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "component": self.component,
            "layout": self.layout,
            "linears": self.linears,
            "kept": list(self.kept),
            "bytes": self.nbytes,
            "findings": [str(fault) for fault in self.faults],
            "notes": list(self.notes),
            "about": list(self.about),
            "loaders": self.loaders,
            "activation_steps": self.activation_steps.to_dict() if self.activation_steps else None,
            "loras": [dict(lora) for lora in self.loras],
        }


@dataclass(frozen=True)
class Inspection:
    """A whole directory."""

    path: Path
    pipeline: bool
    components: tuple[ComponentInspection, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not any(component.faults for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "path": str(self.path),
            "pipeline": self.pipeline,
            "clean": self.clean,
            "experts": [component.to_dict() for component in self.components],
        }


def inspect_checkpoint(
    path: Path | Mapping[str, Path],
    base: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    variant: str | None = None,
) -> Inspection:
    """Read a checkpoint whole and say what it is.

    Args:
        path: a pipeline, a cascade or one component, in any layout; a single file, or component -> file.
        base: the unquantized model, needed for layouts without a config.json.
        progress: told (tensors read, tensors in all).
        variant: of the weight files, as diffusers' `variant=`; None takes the plain ones, or the one that there is.

    Raises InputError and CheckpointError where it cannot be read at all.
    """
    source, under = open_both(path, base, variant)
    filled = under if not source.files else None
    read = [
        (name, read_component(source.read(name), filled.read(name) if filled else None)) for name in source.components
    ]
    packed = [
        name for name, folder in source.encoders.items() if is_packed(folder)
    ]  # float ones are transformers' own affair
    read += [(name, read_component(source.read(name))) for name in packed]
    total, done = sum(len(component.parts) for _, component in read), 0
    inspected = []
    for name, component in read:
        faults = list(component.faults)
        for tensor in component.parts:
            faults += faults_of(component, [tensor])
            done += 1
            progress(done, total)
        inspected.append(_inspected(name, component, tuple(faults)))
    return Inspection(source.path, source.pipeline, tuple(inspected))


def _inspected(name: str, component: Component, faults: tuple[Fault, ...]) -> ComponentInspection:
    first = str(faults[0]) if faults else None
    return ComponentInspection(
        name,
        component.stored.layout,
        counted(component.methods),
        component.kept if any(component.methods.values()) else (),
        sum(tensor.nbytes for tensor in component.stored.tensors.values()),
        faults,
        component.lost,
        component.stored.about,
        {runtime: reason or first for runtime, reason in _loaders(component)},
        component.quantization.activation_steps if component.quantization else None,
        tuple(merged_into(component.config)),
    )


def _loaders(component: Component) -> Iterator[tuple[str, str | None]]:
    """Each runtime, and why it does not load a component as it is stored, None where it does."""
    if component.spec.components == TEXT_ENCODERS:
        yield ENCODERS, None
        return
    for layout in LAYOUTS.values():
        if layout.runtime:
            yield layout.runtime, _why_not(layout, component)
        if layout.plugin:
            own = component.stored.layout == layout.name  # all that it holds, where its own linears do not
            yield layout.plugin, layout.unknown(component.spec) or (None if own else _why_not(PACKED, component))


def _why_not(layout: Layout, component: Component) -> str | None:
    """Why the runtime of a layout does not load a component as it is stored, None where it does."""
    stored, unknown = LAYOUTS[component.stored.layout], layout.unknown(component.spec)
    if unknown or stored.common:
        return unknown
    if stored is layout:
        return layout.why_not(component) if layout.why_not else None
    if reason := layout.unmixed(component.methods):
        return reason
    quantized = stored.quantized or any(component.methods.values())
    ways = [] if quantized else ["mxdit quantize"]  # which writes the packed layout
    if quantized or layout is not PACKED:
        ways.append(f"mxdit convert --to {layout.name}")
    return f"the {stored.name} layout: {', then '.join(ways)}"
