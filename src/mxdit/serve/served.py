"""What a server offers: models by name, each in one mode, and what its requests are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxdit.errors import InputError
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.numerics.formats import block_format

if TYPE_CHECKING:
    from PIL.Image import Image

AS_STORED = "none"  # the mode without quantizing


@dataclass(frozen=True)
class Served:
    """A model in one mode. It crosses to the worker's process, so that it holds no weights.

    name    of the directory, or what the caller called it.
    mode    method that its weights are quantized with while they load, "none" for as they are stored.
    path    of the pipeline's directory.
    task    what it makes.
    keys    of `MXConfig`, for every transformer; `components`, for one.
    dtype   of everything that is not quantized.
    offload whether weights are on the device only while they are used.
    """

    name: str
    mode: str
    path: Path
    task: str
    keys: Mapping[str, Any]
    components: Mapping[str, Any]
    dtype: torch.dtype
    offload: bool = False

    @property
    def id(self) -> str:
        """What clients call it: the name, with its mode where that is not "as stored"."""
        return self.name if self.mode == AS_STORED else f"{self.name}:{self.mode}"

    @property
    def nbytes(self) -> int:
        """About how much memory it takes: its weight files, those of the transformers as they are quantized."""
        model = open_model(self.path)
        total = 0
        for file in self.path.rglob("*.safetensors"):
            online = self.mode != AS_STORED and file.parent.name in model.components
            total += file.stat().st_size * (block_format(self.mode).bits if online else 16) // 16
        return total

    def open(self, device: str = "cpu") -> Session:
        """A session of it, whose weights are not read yet. Raises as `Session.open` does."""
        method = None if self.mode == AS_STORED else self.mode
        return Session.open(
            self.path,
            task=self.task,
            method=method,
            keys=self.keys if method else {},
            components=dict(self.components) if method else None,
            dtype=self.dtype,
            device=device,
            offload=self.offload,
        )


class Catalog:
    """The models that a server offers, by the ids that clients use; the first is the default.

    Raises InputError where two have one id, and what `Session.open` raises for a model that cannot be run so.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self.served = {one.id: one for one in served}
        if len(self.served) < len(served):
            ids = [one.id for one in served]
            twice = next(id for id in ids if ids.count(id) > 1)
            raise InputError("two models have one name", got=twice, hint="Rename a directory.")
        self._sessions = {id: one.open() for id, one in self.served.items()}

    def model(self, id: str) -> ModelDirectory:
        return self._sessions[id].model

    def find(self, id: str | None, with_image: bool) -> Served:
        """The model that a request means; without an id the first that takes what the request has. Raises InputError."""
        if id is None:
            wanted = [one for one in self.served.values() if (one.task == "i2v") == with_image]
            if not wanted:
                what = "makes a video of an image" if with_image else "does without an image"
                raise InputError(f"no model here {what}", field="model", expected=" or ".join(self.served))
            return wanted[0]
        if id not in self.served:
            raise InputError("no such model", field="model", got=repr(id), expected=" or ".join(self.served))
        return self.served[id]

    def request(self, served: Served, fields: Mapping[str, Any], image: Image | None = None) -> Request:
        """The request of these fields of `make_request`, checked. Raises InputError and ConfigError."""
        return self._sessions[served.id].request(**fields, image=image)


def modes_of(path: Path, name: str, tasks: Sequence[str], modes: Sequence[str], **how: Any) -> list[Served]:
    """A directory as what it makes, in each of these modes."""
    model = open_model(path)
    found = []
    for task in tasks or model.tasks[:1]:
        model.check_task(task)
        found += [
            Served(name, mode, path, task, how["keys"], how["components"], how["dtype"], how["offload"])
            for mode in modes
        ]
    return found


def unique(served: Sequence[Served]) -> list[Served]:
    """The same with the task in the name of those that make more than one thing."""
    tasks = {one.name: {other.task for other in served if other.name == one.name} for one in served}
    return [replace(one, name=f"{one.name}-{one.task}") if len(tasks[one.name]) > 1 else one for one in served]
