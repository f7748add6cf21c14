"""`LoraFile`: the caller's choice of an adapter: a file, for which transformer, how strong."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from mxdit.errors import InputError

FIELD = "lora"


@dataclass(frozen=True)
class LoraFile:
    """One file of a LoRA.

    file       .safetensors, with names that diffusers knows.
    scale      times the strength that the file itself has; a finite number.
    component  the transformer that it goes to; None where there is only one.

    Raises InputError for a scale that is no finite number.
    """

    file: Path
    scale: float = 1.0
    component: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", Path(self.file))
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise InputError("the scale is no finite number", field=FIELD, where=str(self.file), got=repr(self.scale))
        object.__setattr__(self, "scale", float(self.scale))

    @classmethod
    def parse(cls, text: str, components: Iterable[str]) -> LoraFile:
        """What "FILE", "FILE:0.8" or "transformer_2=FILE:0.8" says; `components` are the names that may stand in front.

        Raises InputError for a scale that is none. A colon of a file's own counts as such where the file is there.
        """
        name, equals, rest = text.partition("=")
        component, path = (name, rest) if equals and name in components else (None, text)
        file, colon, scale = path.rpartition(":")
        if not colon or os.path.isfile(path):
            return cls(Path(path), 1.0, component)
        try:
            return cls(Path(file), float(scale), component)
        except ValueError:
            raise InputError(
                "the scale is no finite number",
                field=FIELD,
                got=repr(scale),
                expected="FILE or FILE:SCALE, as in a.safetensors:0.8",
            ) from None


LoraLike: TypeAlias = LoraFile | Path | str


def assigned(loras: Iterable[LoraLike], components: Iterable[str]) -> tuple[LoraFile, ...]:
    """They with the transformer of each, in their order; a path alone is that file at its own strength.

    Raises InputError for a transformer that is not there, for one that is not named where there are several, and for no file.
    """
    known, found = list(components), list[LoraFile]()
    for lora in loras:
        lora = lora if isinstance(lora, LoraFile) else LoraFile(Path(lora))
        if lora.component is None and len(known) > 1:
            raise InputError(
                "it is not said which transformer the LoRA is for",
                field=FIELD,
                got=str(lora.file),
                expected=" or ".join(f"{name}={lora.file}" for name in known),
                hint="Of a cascade, the first is the high-noise expert; a LoRA for both comes in two files, or is named twice.",
            )
        component = known[0] if lora.component is None else lora.component
        if component not in known:
            raise InputError(
                "a LoRA for a transformer that is not there",
                field=FIELD,
                got=component,
                expected=" or ".join(filter(None, known)) or "no name in front: the directory is one transformer",
            )
        if not os.path.isfile(lora.file):
            raise InputError(
                "no such file", field=FIELD, where=str(lora.file), expected="a .safetensors file of a LoRA"
            )
        found.append(replace(lora, component=component))
    return tuple(found)
