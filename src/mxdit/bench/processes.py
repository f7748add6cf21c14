"""Measuring in a process of its own, and what a process has of memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from mxdit.errors import BackendError

_T = TypeVar("_T")

# glibc keeps freed blocks of up to 32 MB for later, or not, as they happen to lie. Where memory is measured, tensors shall go
# back when they are freed; it costs time.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
STATUS = Path("/proc/self/status")


def alone(function: Callable[..., _T], *args: Any, environment: Mapping[str, str] | None = None) -> _T:
    """``function(*args)`` in a fresh process, where nothing else has taken memory. Both must be importable there.

    Args:
        environment: variables that it sees beside this process's own, such as `TIDY`.

    Raises what the function raises, and BackendError for a process that was killed.
    """
    with _environment(environment or {}), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise BackendError(
                "the process that measured was killed", where="bench", hint="Most likely memory ran out: measure less."
            ) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes: ``RssAnon`` is memory that no file backs, ``VmRSS`` all that is resident.

    Raises BackendError where the system has no such file.
    """
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise BackendError(
        "this system does not say what memory a process has", where=str(STATUS), expected=f"a line {key}"
    )


class Sampler:
    """The largest RssAnon and RSS of this process, seen every millisecond from a thread, while a ``with`` block runs; on an
    accelerator also the most that its allocator has given out.

    Attributes:
        anon, rss: bytes.
        device: bytes on the accelerator, 0 on a CPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.anon = self.rss = self.device = 0
        self._name = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.anon, self.rss = max(self.anon, status("RssAnon")), max(self.rss, status("VmRSS"))

    def __enter__(self) -> Sampler:
        if self._name != "cpu":
            torch.get_device_module(self._name).reset_peak_memory_stats(self._name)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        if self._name != "cpu":
            self.device = torch.get_device_module(self._name).max_memory_allocated(self._name)
