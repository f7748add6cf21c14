"""What goes with the results of a run: where they were got, and all of it as JSON."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mxdit.backends import REFERENCE, backends
from mxdit.conformance.case import FAIL, PASS, REFUSED, SKIPPED, Result
from mxdit.version import installed

SCHEMA = 1  # of the JSON; a change that readers notice is a new number
PACKAGES = ("mxdit", "torch", "torch_npu", "triton", "diffusers")


def environment(device: str) -> dict[str, Any]:
    """Versions, the machine, the device, and which implementation answers there: JSON-serializable.

    ``why_not`` is for each backend of mxdit that is for this type of device and does not answer, by name.
    """
    kind = torch.device(device).type
    own = [(backend, backend.why_not()) for backend in backends() if backend.device == kind]
    answering = next((backend for backend, reason in own if reason is None), REFERENCE)
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


def totals(results: Sequence[Result]) -> dict[str, int]:
    """How many results there are of each verdict, and how many codes and outputs were compared."""
    counts = Counter(result.verdict for result in results)
    verdicts = {verdict: counts[verdict] for verdict in (PASS, FAIL, REFUSED, SKIPPED)}
    return {"items": len(results), **verdicts, "elements": sum(result.elements for result in results)}


def report(where: dict[str, Any], results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """All of a run, JSON-serializable; ``where`` is its `environment`."""
    return {
        "schema": SCHEMA,
        "environment": where,
        "items": [result.to_dict() for result in results],
        "totals": totals(results),
        "seconds": seconds,
    }


def _cpu() -> str:
    """What the CPU calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return next(names, platform.processor() or platform.machine())


def _device_name(device: str) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device if name is None else name(device)
