"""What is known of one expert of a checkpoint: as a layout's reader finds it, and in canonical form.

A layout's reader gives tensors by our names (`Stored`); `canonical.read_expert` makes an `Expert` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxdit.checkpoint.files import StoredTensor
from mxdit.checkpoint.writer import Part
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError
from mxdit.models import ModelSpec


@dataclass(frozen=True)
class Stored:
    """An expert as a layout's reader finds it.

    folder     where it lies.
    layout     what its files are: "diffusers", "original", "modelslim", "sglang", "packed" or "vllm-omni".
    tensors    by our names, wrappers stripped.
    config     the transformer's config.json in diffusers' keys, or None where the layout has none.
    quantization  what config.json says of it, if it does.
    methods    linear -> method, where a description says so; linears that it calls float map to None.
    activation what a description says activations are, if it does.
    description  that description.
    lost       what the layout holds and we have no place for.
    """

    folder: Path
    layout: str
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None
    quantization: MXConfig | None = None
    methods: Mapping[str, str | None] | None = None
    activation: str | None = None
    description: Mapping[str, Any] | None = None
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One fault: the tensor or layer, what is wrong, what was seen and what was wanted."""

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
class Expert:
    """An expert in canonical form: packed names, shapes and dtypes; see docs/format.md.

    quantization  None for a float model.
    parts         every tensor, in the model's order, the parts of a linear together.
    methods       linear -> method, None where it is float.
    findings      what is wrong with it.
    lost          what a conversion to canonical form loses.
    """

    stored: Stored
    base: Stored | None
    spec: ModelSpec
    config: Mapping[str, Any]
    quantization: MXConfig | None
    parts: Mapping[str, Part]
    methods: Mapping[str, str | None]
    findings: tuple[Finding, ...] = ()
    lost: tuple[str, ...] = ()

    def unknown_to(self, runtime: str) -> str | None:
        """Why there is no telling how a runtime names the layers of this family; None where its spec says so."""
        if runtime in self.spec.runtimes:
            return None
        return f"mxdit does not know by which names it would look for the layers of {self.spec.transformer}"

    def require_sound(self) -> None:
        """Raise the first finding, if there is one."""
        if self.findings:
            first, others = self.findings[0], len(self.findings) - 1
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


def faults_of(expert: Expert, tensors: Iterable[str] | None = None) -> Iterable[Finding]:
    """Read every quantized tensor and give what its data is at fault for, one finding a tensor."""
    for name in expert.parts if tensors is None else tensors:
        if expert.methods.get(name.rpartition(".")[0]):
            try:
                expert.parts[name].read()
            except CheckpointError as error:
                yield Finding(error.where or name, error.what, error.got, error.expected, error.hint)
