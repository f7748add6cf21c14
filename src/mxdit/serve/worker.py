"""The process that holds models on one device, and runs one job at a time.

It is told jobs through a pipe, and tells steps and ends. When the pipe breaks, because the server is gone, it ends at once: what
it was making belongs to nobody.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mxdit.checkpoint.writer import sync
from mxdit.errors import Cancelled, InputError, MXDiTError
from mxdit.generation import compiling
from mxdit.generation.media import read_image
from mxdit.generation.request import Request
from mxdit.generation.session import Session
from mxdit.serve.adapters import FIELD, Shelf
from mxdit.serve.job import CANCELLED, INVALID_IMAGE
from mxdit.serve.schema import again
from mxdit.serve.served import Served

log = logging.getLogger(__name__)

FAULTS = (RuntimeError, ValueError, OSError)  # torch's own; others end the process, and the next one is started


@dataclass(frozen=True)
class Task:
    """A job for a worker.

    image   file of the first frame, or None.
    output  name to write to, whose ending says the kind.
    """

    id: str
    model: str
    fields: Mapping[str, Any]
    image: Path | None
    output: Path


@dataclass(frozen=True)
class Loaded:
    """A model is in memory: what its linears are, by transformer and method."""

    model: str
    linears: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Unplanned:
    """A clip of the default size does not fit into the first model's memory: what is held of it is up to the first job."""


@dataclass(frozen=True)
class Stepped:
    """So many steps of a job are done."""

    id: str
    step: int


@dataclass(frozen=True)
class Done:
    """A job's file is written, to the disk. `seconds` are those of the run, loading not among them."""

    id: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Ended:
    """A job has no file: it was stopped (`code` CANCELLED), or it failed. The message is for the client, and names no path."""

    id: str
    code: str
    message: str


def main(
    pipe: Connection, served: Mapping[str, Served], device: str, warm: str | None, shelf: Shelf, level: int
) -> None:
    """Carry out what comes through the pipe, until it is closed.

    Args:
        shelf: adapters that jobs name.
        warm: model to load before the first job, if any.
        level: from which on things are logged to stderr, which is the server's.
    """
    logging.basicConfig(level=level, format=f"worker of {device}: %(message)s")
    if any(one.compile for one in served.values()):
        compiling.logger.setLevel(logging.INFO)  # why a step takes minutes
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to all by a terminal and by systemd; the server decides here
    _Worker(pipe, served, device, shelf).work(warm)


class _Worker:
    def __init__(self, pipe: Connection, served: Mapping[str, Served], device: str, shelf: Shelf) -> None:
        self._pipe, self._served, self._device, self._shelf = pipe, served, device, shelf
        self._sessions: dict[str, Session] = {}
        self._stop = threading.Event()
        self._tasks: list[Task] = []
        self._told = threading.Condition()

    def work(self, warm: str | None) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        if warm is not None:
            try:
                self._session(warm)
            except (MXDiTError, MemoryError, *FAULTS) as error:
                log.warning(
                    "%s: %s", warm, str(error) or type(error).__name__, exc_info=not isinstance(error, MXDiTError)
                )
                if isinstance(error, InputError) and error.field == "memory":
                    self._pipe.send(Unplanned())
        while True:
            with self._told:
                self._told.wait_for(lambda: bool(self._tasks))
                task = self._tasks.pop()
            self._run(task)

    def _listen(self) -> None:
        while True:
            try:
                told = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if told is None:
                self._stop.set()
                continue
            with self._told:
                self._stop.clear()
                self._tasks.append(told)
                self._told.notify()

    def _session(self, name: str, request_of: Callable[[Session], Request | None] = lambda _: None) -> Session:
        """The model of that name, loaded, if it was not before, in a way that the request fits that is made for it."""
        if name in self._sessions:
            self._sessions[name] = self._sessions.pop(name)  # the one that was used last stands last
        else:
            self._make_room(self._served[name])
            session = self._served[name].open(self._device)
            session.load(request_of(session))
            self._sessions[name] = session
            linears = {
                of: dict(
                    Counter(f"{row.method} {row.scheme}" if row.scheme else "unquantized" for row in report.layers)
                )
                for of, report in session.reports().items()
            }
            self._pipe.send(Loaded(name, linears))
        return self._sessions[name]

    def _make_room(self, served: Served) -> None:
        """Let go of models that were not used for longest, until this one fits. Raises MemoryError where it never will."""
        need = served.nbytes
        if served.memory is not None:  # the budget is the worker's, not one model's
            self._sessions.clear()
            gc.collect()
        while (free := _free(self._device)) is not None and free < need:
            if not self._sessions:
                raise MemoryError(f"{served.id} takes {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
            dropped = next(iter(self._sessions))
            log.info("%s makes room for %s", dropped, served.id)
            del self._sessions[dropped]
            gc.collect()

    def _run(self, task: Task) -> None:
        try:
            image = None if task.image is None else read_image(task.image)
        except InputError as error:
            log.warning("job %s: %s", task.id, error)
            self._pipe.send(Ended(task.id, INVALID_IMAGE, "the first frame is no readable image"))
            return
        try:

            def request_of(session: Session) -> Request:
                fields = again(task.fields, partial(session.model.takes, session.task))
                loras = self._shelf.files(task.fields.get(FIELD, ()), session.model.components)
                return session.request(**fields, loras=loras, image=image)

            session = self._session(task.model, request_of)
            result = session.run(
                request_of(session), lambda step, _: self._pipe.send(Stepped(task.id, step)), self._stop
            )
            result.save(task.output)
            sync(task.output)
            self._pipe.send(Done(task.id, result.seconds, result.peak_bytes))
        except Cancelled:
            self._pipe.send(Ended(task.id, CANCELLED, "the job was cancelled"))
        except MXDiTError as error:
            log.warning("job %s: %s", task.id, error)
            placeless = MXDiTError(
                error.what, field=error.field, got=error.got, expected=error.expected, hint=error.hint
            )
            self._pipe.send(Ended(task.id, "failed", str(placeless)))
        except MemoryError as error:
            self._pipe.send(Ended(task.id, "out_of_memory", str(error) or "there was not enough memory"))
        except FAULTS as error:
            log.exception("job %s failed", task.id)
            said = error.strerror if isinstance(error, OSError) else error  # an OSError's own text names the file
            self._pipe.send(Ended(task.id, "internal_error", f"{type(error).__name__}: {said}"))


def _free(device: str) -> int | None:
    """Bytes of memory that can be had on a device; None where nobody says."""
    kind = torch.device(device).type
    if kind == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    mem_get_info = getattr(torch.get_device_module(kind), "mem_get_info", None)
    return None if mem_get_info is None else mem_get_info(device)[0]
