"""What a process and a device have of memory, now and at most."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from mxdit.errors import BackendError

STATUS = Path("/proc/self/status")


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
    """The most memory that is held while a ``with`` block runs.

    The process is looked at from a thread; an accelerator counts for itself, and its counters begin anew.

    Attributes:
        anon, rss: the largest RssAnon and RSS of this process in bytes, 0 where the system does not say.
        device: the most bytes that the accelerator's allocator has given out; 0 on a CPU, and where it does not count.
    """

    def __init__(self, device: str = "cpu", every: float = 0.001) -> None:
        self.anon = self.rss = self.device = 0
        self._every, self._device, self._counters = every, torch.device(device), counters(device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self._look()

    def _look(self) -> None:
        self.anon, self.rss = max(self.anon, status("RssAnon")), max(self.rss, status("VmRSS"))

    def __enter__(self) -> Sampler:
        if self._counters is not None:
            self._counters.reset_peak_memory_stats(self._device)
        if STATUS.is_file():
            self._look()
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._look()
        if self._counters is not None:
            self.device = self._counters.max_memory_allocated(self._device)


def counters(device: str) -> Any:
    """The torch module that counts a device's memory, such as `torch.cuda`; None for a CPU, and where none counts."""
    if torch.device(device).type == "cpu":
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None
