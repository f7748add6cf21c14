"""What is known of one transformer of a checkpoint: as a layout's reader finds it, and in canonical form.

A layout's reader gives tensors by our names (`Stored`); `canonical.read_component` makes a `Component` of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.writer import Part
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError
from mxdit.models import ModelSpec


@dataclass(frozen=True)
class Stored:
    """A component as a layout's reader finds it.

    folder     where it lies.
    layout     name of the layout that its files are in, one of `layouts.LAYOUTS`.
    tensors    by our names, wrappers stripped.
    config     the transformer's config.json in diffusers' keys, or None where the layout has none.
    quantization  what config.json says of it, if it does.
    methods    linear -> method, where a description says so; linears that it calls float map to None.
    raised     four-bit linears whose activations a description says are MXFP8.
    description  that description.
    lost       what the layout holds and we have no place for.
    decoded    the tensors that are made of codes when they are read.
    about      sentences on what a single file is.
    """

    folder: Path
    layout: str
    tensors: Mapping[str, Readable]
    config: Mapping[str, Any] | None
    quantization: MXConfig | None = None
    methods: Mapping[str, str | None] | None = None
    raised: tuple[str, ...] = ()
    description: Mapping[str, Any] | None = None
    lost: tuple[str, ...] = ()
    decoded: Collection[str] = ()
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the tensor or layer, what is wrong, what was seen and what was wanted."""

    where: str
    what: str
    got: object = None
    expected: object = None
    hint: str | None = None

    def error(self) -> CheckpointError:
        """The fault as an exception."""
        return CheckpointError(self.what, where=self.where, got=self.got, expected=self.expected, hint=self.hint)

    def __str__(self) -> str:
        return str(self.error())


@dataclass(frozen=True)
class Component:
    """A component in canonical form: packed names, shapes and dtypes; see docs/format.md.

    skeleton      the model that its config describes, without memory.
    quantization  None for a float model.
    parts         every tensor, in the model's order, the parts of a linear together.
    methods       linear -> method, None where it is float.
    faults        what is wrong with it.
    lost          what a conversion to canonical form loses.
    """

    stored: Stored
    base: Stored | None
    spec: ModelSpec
    config: Mapping[str, Any]
    skeleton: nn.Module
    quantization: MXConfig | None
    parts: Mapping[str, Part]
    methods: Mapping[str, str | None]
    faults: tuple[Fault, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[str, ...]:
        """The float linears inside the blocks: what quantizing passed over."""
        return tuple(path for path, method in self.methods.items() if not method and self.spec.place_of(path))

    @property
    def reads(self) -> tuple[Path, ...]:
        """The files that its tensors come from."""
        stored = [self.stored, *([self.base] if self.base else [])]
        return tuple(sorted({tensor.file for source in stored for tensor in source.tensors.values()}))

    def require_sound(self) -> None:
        """Raise the first fault, if there is one."""
        if self.faults:
            first, others = self.faults[0], len(self.faults) - 1
            error = first.error()
            if not others:
                raise error
            rest = f"{others} more finding{'s' * (others > 1)}: run mxdit inspect for all."
            raise CheckpointError(
                error.what,
                where=error.where,
                got=error.got,
                expected=error.expected,
                hint=f"{error.hint} {rest}" if error.hint else rest,
            )


def counted(methods: Mapping[str, str | None]) -> dict[str, int]:
    """Method, or "float" -> number of linears."""
    return dict(Counter(method or "float" for method in methods.values()))


def faults_of(component: Component, tensors: Iterable[str]) -> Iterable[Fault]:
    """Read those of these tensors that are in codes and give what their data is at fault for, one fault a tensor."""
    for name in tensors:
        if component.methods.get(name.rpartition(".")[0]) or name in component.stored.decoded:
            try:
                component.parts[name].read()
            except CheckpointError as error:
                yield Fault(error.where or name, error.what, error.got, error.expected, error.hint)
