"""What a server offers: models by name, each in one mode, and what its requests are checked against."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mxdit.config.attention import AttentionLike, AttentionPolicy, text_of
from mxdit.errors import InputError
from mxdit.generation.directory import ModelDirectory, open_model
from mxdit.generation.session import Session
from mxdit.models import COMPONENTS
from mxdit.numerics.formats import block_format
from mxdit.serve.adapters import FIELD, Shelf
from mxdit.serve.schema import FIELDS, TAKES, VideoBody, stand_in, stored

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
    memory  bytes that a run may take; None where nobody says.
    attention, compile, fused  as `Session.open` takes them.
    """

    name: str
    mode: str
    path: Path
    task: str
    keys: Mapping[str, Any]
    components: Mapping[str, Any]
    dtype: torch.dtype
    offload: bool = False
    memory: int | None = None
    attention: AttentionLike | None = None
    compile: bool = False
    fused: bool = False

    @property
    def id(self) -> str:
        """What clients call it: the name, with its mode where that is not "as stored"."""
        return self.name if self.mode == AS_STORED else f"{self.name}:{self.mode}"

    @property
    def nbytes(self) -> int:
        """About how much memory it takes: its weight files, those of the transformers as they are quantized; no more than it
        may."""
        model = open_model(self.path)
        total = 0
        for file in self.path.rglob("*.safetensors"):
            online = self.mode != AS_STORED and file.parent.name in model.components
            total += file.stat().st_size * (block_format(self.mode).bits if online else 16) // 16
        return total if self.memory is None else min(total, self.memory)

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
            memory=self.memory,
            attention=self.attention,
            compile=self.compile,
            fused=self.fused,
        )


@dataclass(frozen=True)
class Order:
    """A request that was checked: what a job is made of.

    fields  of `make_request`, JSON-serializable, every choice made that can be made here.
    steps   of it; 0 where that is unknown.
    """

    model: str
    fields: Mapping[str, Any]
    steps: int
    media_type: str


class NoSuchModel(InputError):
    """A request names a model that is not offered."""


class Catalog:
    """The models that a server offers, by the ids that clients use; the first is the default.

    Args:
        served: the models.
        shelf: adapters that requests may name.

    Attributes:
        linears: model -> transformer -> method -> how many linears run so, of the models that were loaded so far.

    Raises InputError where two have one id, and what `Session.open` raises for a model that cannot be run so.
    """

    image_tasks = ("t2i", "t2v")  # of a video model one frame

    def __init__(self, served: Sequence[Served], shelf: Shelf | None = None) -> None:
        self.shelf = shelf or Shelf()
        self.served = {one.id: one for one in served}
        if len(self.served) < len(served):
            ids = [one.id for one in served]
            twice = next(id for id in ids if ids.count(id) > 1)
            raise InputError("two models have one name", got=twice, hint="Rename a directory.")
        self._sessions = {id: one.open() for id, one in self.served.items()}
        self.linears: dict[str, Mapping[str, Mapping[str, int]]] = {}

    def order(self, body: VideoBody, data: bytes | None) -> Order:
        """What a request with this first frame asks for. Raises InputError and ConfigError."""
        served = self._find(body.model, data is not None)
        session = self._sessions[served.id]
        fields = body.fields(session.model.geometry.nearest_frames, session.model.preset(served.task).fps)
        fields.setdefault("seed", secrets.randbelow(1 << 31))
        named = fields.pop(FIELD, [])
        try:
            request = session.request(
                **fields,
                loras=self.shelf.files(named, session.model.components),
                image=None if data is None else stand_in(data),
            )
        except InputError as error:
            if error.field != FIELD:
                raise
            # Where the folder lies is the server's affair.
            where = error.where and error.where.replace(f"{self.shelf.folder}/", "")
            raise InputError(
                error.what, field=FIELD, where=where, got=error.got, expected=error.expected, hint=error.hint
            ) from None
        kept = {**stored(request), **({FIELD: named} if named else {})}
        return Order(served.id, kept, request.steps, "image/png" if request.still else "video/mp4")

    def adapters(self) -> list[dict[str, Any]]:
        """What clients read about the adapters that they may name."""
        return self.shelf.shown()

    def models(self) -> list[dict[str, Any]]:
        """What clients read about each."""
        return [self._shown(served, self._sessions[id].model) for id, served in self.served.items()]

    def _find(self, id: str | None, with_image: bool) -> Served:
        """The model that a request means; without an id the first that takes what the request has.

        Raises NoSuchModel, and InputError where none takes it.
        """
        if id is None:
            wanted = [one for one in self.served.values() if (one.task == "i2v") == with_image]
            if not wanted:
                what = "makes a video of an image" if with_image else "does without an image"
                raise InputError(f"no model here {what}", field="model", expected=" or ".join(self.served))
            return wanted[0]
        if id not in self.served:
            raise NoSuchModel("no such model", field="model", got=repr(id), expected=" or ".join(self.served))
        return self.served[id]

    def _shown(self, served: Served, model: ModelDirectory) -> dict[str, Any]:
        preset, linears = model.preset(served.task), self.linears.get(served.id)
        attention = AttentionPolicy.of_each(served.attention, model.components, COMPONENTS)
        ours = {theirs: name for name, theirs in FIELDS.items()} | {"size": "height"}
        return {
            "id": served.id,
            "object": "model",
            "created": 0,
            "owned_by": "mxdit",
            "name": served.name,
            "mode": served.mode,
            "attention": text_of(attention, model.components),
            "compile": served.compile,
            "fused": served.fused,
            "task": served.task,
            "loaded": linears is not None,
            "experts": linears,
            "takes": [
                *(name for name in TAKES if model.takes(served.task, ours.get(name, name))),
                *([FIELD] if self.shelf.folder else ()),
            ],
            "defaults": {
                "prompt": preset.prompt,
                "negative_prompt": preset.negative_prompt,
                "size": f"{preset.size[1]}x{preset.size[0]}",
                "num_frames": preset.frames,
                "fps": preset.fps,
                "num_inference_steps": preset.steps,
                "guidance_scale": preset.guidance,
                "guidance_scale_2": preset.guidance_2,
                "flow_shift": model.flow_shift if preset.flow_shift is None else preset.flow_shift,
                "boundary_ratio": model.settings.get("boundary_ratio"),
            },
        }


def modes_of(path: Path, name: str, tasks: Sequence[str], modes: Sequence[str], **how: Any) -> list[Served]:
    """A directory as what it makes, in each of these modes; `how` are the other fields of `Served`."""
    model = open_model(path)
    found = []
    for task in tasks or model.tasks[:1]:
        model.check_task(task)
        found += [Served(name, mode, path, task, **how) for mode in modes]
    return found


def unique(served: Sequence[Served]) -> list[Served]:
    """The same with the task in the name of those that make more than one thing."""
    tasks = {one.name: {other.task for other in served if other.name == one.name} for one in served}
    return [replace(one, name=f"{one.name}-{one.task}") if len(tasks[one.name]) > 1 else one for one in served]
