"""Named adapters: LoRA files of the server's data directory, which clients ask for by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxdit.config.loras import LoraFile
from mxdit.errors import InputError
from mxdit.models import COMPONENTS

FIELD = "lora"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIX = ".safetensors"
MOST = 100  # of a scale; strengths are about 1
COUNT = 8  # adapters of one request


@dataclass(frozen=True)
class Shelf:
    """A folder of adapters, or None of a server that has none; who runs the server puts them there, at any time.

    `NAME.safetensors` is for models of one transformer, `NAME/transformer.safetensors` and `NAME/transformer_2.safetensors` are
    for a cascade, or one of them. Names are looked for among those that are there: none is ever made a path.
    """

    folder: Path | None = None

    def found(self) -> dict[str, dict[str | None, Path]]:
        """Name -> transformer, None for the only one -> file."""
        found: dict[str, dict[str | None, Path]] = {}
        for entry in sorted(self.folder.iterdir()) if self.folder and self.folder.is_dir() else ():
            there: dict[str | None, Path] = {}
            if entry.is_dir():
                there.update({name: file for name in COMPONENTS if (file := entry / f"{name}{SUFFIX}").is_file()})
            elif entry.suffix == SUFFIX and entry.is_file():
                there[None] = entry
            name = entry.name if entry.is_dir() else entry.stem
            if there and NAME.fullmatch(name):
                found.setdefault(name, there)  # a folder stands before a file of its name
        return found

    def shown(self) -> list[dict[str, Any]]:
        """What clients read about each."""
        shown = []
        for name, files in self.found().items():
            try:
                states = [file.stat() for file in files.values()]
            except FileNotFoundError:  # taken away since it was found
                continue
            shown.append(
                {
                    "id": name,
                    "object": "adapter",
                    "created": int(max(state.st_mtime for state in states)),
                    "transformers": None if None in files else list(files),
                    "bytes": sum(state.st_size for state in states),
                }
            )
        return shown

    def files(self, asked: Sequence[Mapping[str, Any]], components: Collection[str]) -> list[LoraFile]:
        """The files of the adapters in a request, as `lora_of` gives them, for a model of these transformers.

        Raises InputError for a name that is not there, and an adapter for other transformers.
        """
        found = self.found() if asked else {}
        loras = []
        for adapter in asked:
            files = found.get(adapter["name"])
            if files is None:
                expected = " or ".join(found) or "none: the server has no adapters"
                raise InputError("no such adapter", field=FIELD, got=repr(adapter["name"])[:120], expected=expected)
            others = [
                name or "the only one" for name in files if name not in components and (name or len(components) > 1)
            ]
            if others:
                raise InputError(
                    "the adapter is for another transformer than the model has",
                    field=FIELD,
                    got=f"{adapter['name']}, for {others[0]}",
                    expected=" or ".join(components),
                    hint="Of a cascade an adapter is a folder with a file for each expert.",
                )
            loras += [LoraFile(file, adapter["scale"], component) for component, file in files.items()]
        return loras


def lora_of(given: Any) -> list[dict[str, Any]]:
    """The field `lora` of a request as [{"name": ..., "scale": ...}]: a name, such an object, or a list of both.

    Raises InputError for anything else. vLLM-Omni's field has the same name and keys, and a path, which no client may name here.
    """
    found = []
    for one in given if isinstance(given, list) else [given]:
        adapter = {"name": one} if isinstance(one, str) else one
        if not isinstance(adapter, Mapping) or not isinstance(adapter.get("name"), str):
            raise InputError(
                "no name of an adapter",
                field=FIELD,
                got=repr(one)[:120],
                expected='"NAME" or {"name": "NAME", "scale": 1.0}',
            )
        odd = next((key for key in adapter if key not in ("name", "scale")), None)
        if odd is not None:
            raise InputError("no such key of an adapter", field=FIELD, got=repr(odd)[:120], expected="name, scale")
        scale = adapter.get("scale", 1.0)
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
            or abs(scale) > MOST
        ):
            raise InputError(
                "the scale is no number that is taken",
                field=FIELD,
                got=repr(scale)[:120],
                expected=f"-{MOST} to {MOST}",
            )
        found.append({"name": adapter["name"], "scale": float(scale)})
    if len(found) > COUNT:
        raise InputError("too many adapters", field=FIELD, got=len(found), expected=f"at most {COUNT}")
    return found
