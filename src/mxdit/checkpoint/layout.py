"""`Layout`: one way to store a component in a folder, as a record. docs/adding-a-layout.md shows how to add one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.writer import STEM, Part
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError
from mxdit.models import ModelSpec
from mxdit.numerics.formats import BlockFormat

CONFIG = "config.json"


@dataclass(frozen=True)
class Folder:
    """A component's folder, or the single file that it is, before it is known which layout it is in.

    spec      the family that its model is of.
    config    its config.json as it is there, or None.
    tensors   of its weight files, by their own names.
    original  whether these are the names of the model's own release.
    described whether a description beside the weights says what is quantized, and counts (`layouts.description`).
    metadata  of a single file's header.
    """

    path: Path
    spec: ModelSpec
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Readable]
    original: bool
    described: bool
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def stated(self) -> Any:
        """The `quantization_config` of its config.json."""
        return self.config.get("quantization_config") if self.config else None

    @property
    def named(self) -> bool:
        """Whether tensors have diffusers' names and config.json alone says what they are."""
        return self.config is not None and not self.original and not self.described

    def renamed(self, ours: Callable[[str], str]) -> dict[str, Readable]:
        """The tensors by our names. Raises CheckpointError where two would have one."""
        found: dict[str, Readable] = {}
        for name, tensor in self.tensors.items():
            if ours(name) in found:
                raise CheckpointError(
                    "two tensors are one by name", where=str(self.path), got=f"{found[ours(name)].name} and {name}"
                )
            found[ours(name)] = tensor
        return found


@dataclass(frozen=True)
class Written:
    """A component as a layout stores it.

    parts         its tensors, by the names that the files have.
    quantization  the `quantization_config` of its config.json, if it has one.
    files         name -> object of other JSON files.
    lost          what the layout cannot say.
    stem          of its weight files' names.
    """

    parts: Mapping[str, Part]
    quantization: Mapping[str, Any] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    stem: str = STEM


@dataclass(frozen=True)
class Layout:
    """One way to store a component.

    name         what commands, messages and `ModelSpec.runtimes` call it.
    recognizes   whether a folder is in it. No folder is in two.
    read         what is there, by our names.
    write        how a quantized component is stored in it; None for a layout that is only read.
    runtime      who loads it as it is, with the version that was looked at; None where nobody does.
    why_not      why that runtime would not load a component that is stored in it, or load it wrong; None where it runs it
                 right. Without it, it runs all of them.
    plugin       who loads it, and the packed layout too, with mxdit's plugin in it; None where there is no plugin.
    quantized    whether it can hold quantized linears.
    mixed        whether it can hold a component whose linears have more than one method.
    common       whether every runtime loads it.
    by_runtime_names  whether it names layers as `ModelSpec.runtimes[name]` says.
    as_released  whether tensors and components have the names of the model's own release, and nothing lies beside the
                 components: its readers take the rest from the release.
    floats       linear -> whether its config calls it float, for those of which the config says anything; given the config
                 and the skeleton. Raises ConfigError where the config does not fit the model.
    filler       whether a tensor of a linear, given the linear's format and the tensor's leaf name, is one that `write` fills
                 in and that says nothing.
    scale_alg    `mxfp4_scale_alg` of single-scale components, where its files do not say.
    suffix       of the files where it stores a component in one file that is no folder's; None where it stores folders.
    """

    name: str
    recognizes: Callable[[Folder], bool]
    read: Callable[[Folder], Stored]
    write: Callable[[Component], Written] | None = None
    runtime: str | None = None
    why_not: Callable[[Component], str | None] | None = None
    plugin: str | None = None
    quantized: bool = True
    mixed: bool = True
    common: bool = False
    by_runtime_names: bool = False
    as_released: bool = False
    floats: Callable[[MXConfig, nn.Module], Mapping[str, bool]] | None = None
    filler: Callable[[BlockFormat, str, Readable], bool] | None = None
    scale_alg: int | None = None
    suffix: str | None = None

    def unmixed(self, methods: Mapping[str, str | None]) -> str | None:
        """Why it cannot hold a component of these methods (linear -> method, None for float); None where it can."""
        found = sorted({method for method in methods.values() if method})
        if self.mixed or len(found) < 2:
            return None
        return f"{self.name} has one method for a transformer, and this one has {' and '.join(found)}"

    def unknown(self, spec: ModelSpec) -> str | None:
        """Why there is no telling how it names the layers of a family; None where the spec says so."""
        if self.by_runtime_names and self.name not in spec.runtimes:
            return f"mxdit does not know by which names the runtime looks for the layers of {spec.transformer}"
        if self.as_released and not spec.original:
            return f"mxdit does not know the names that {spec.transformer} has in its own release"
        return None

    def folder(self, spec: ModelSpec, components: Collection[str], name: str) -> str:
        """The folder of one of a checkpoint's components, by their names in a pipeline; "" is the directory itself."""
        if not self.as_released:
            return name
        return next((of for of, ours in spec.original_components.items() if ours == name and len(components) > 1), "")
