"""Where results were got: versions, the machine, the device and who answers there."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mxdit.backends import REFERENCE, backend_for, backends
from mxdit.version import installed

PACKAGES = ("mxdit", "torch", "torch_npu", "triton", "diffusers")


def environment(device: str) -> dict[str, Any]:
    """Versions, the machine, the device, and which implementation answers there: JSON-serializable.

    ``why_not`` is for each backend of mxdit that is for this type of device and does not answer, by name.
    """
    kind = torch.device(device).type
    own = [(backend, backend.why_not()) for backend in backends() if backend.device == kind]
    answering = backend_for(torch.device(device))
    return {
        "packages": {name: installed(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": device,
        "device_name": _cpu() if kind == "cpu" else _device_name(device),
        "backend": answering.name,
        "about": "plain torch" if answering is REFERENCE else answering.about(),
        "why_not": {backend.name: reason for backend, reason in own if reason is not None},
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own work in one thread, for work so small that threads would only wait for each other: on a busy machine ten
    times as long as the work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu() -> str:
    """What the CPU calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return next(names, platform.processor() or platform.machine())


def _device_name(device: str) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device if name is None else name(device)
