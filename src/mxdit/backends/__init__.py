"""Backends: who can answer the ops on which device, and why not.

A backend is a module that implements the ops for its device type when it is imported (`mxdit.ops.implement`), and says of
itself what a `Backend` holds; torch's dispatcher picks its kernels. The three of mxdit are imported with it and import
nothing of a vendor's until they are asked. Another package adds its own with an entry point in the group
``mxdit.backends``, named after the device type, whose value is its `Backend` (docs/adding-a-backend.md). It is imported when
a weight first comes to such a device, or when somebody lists the backends.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

import torch

from mxdit.backends import ascend, cpu, cuda
from mxdit.backends.record import Backend, Layout
from mxdit.errors import BackendError

GROUP = "mxdit.backends"
REFERENCE = Backend(name="reference (torch)", device="any", why_not=lambda: None)
_OWN = (cpu.BACKEND, cuda.BACKEND, ascend.BACKEND)


def backends() -> tuple[Backend, ...]:
    """Every backend that is installed, usable or not: mxdit's, other packages' by device type, the reference last."""
    return (*_OWN, *(_listed(name) for name in sorted(_entry_points())), REFERENCE)


def backend_for(device: torch.device) -> Backend:
    """The backend that answers on this device; the reference where no other can."""
    for backend in _OWN:
        if backend.device == device.type:
            return backend if backend.why_not() is None else REFERENCE
    if device.type in _entry_points() and _loaded(device.type).why_not() is None:
        return _loaded(device.type)
    return REFERENCE


def import_backend_of(device: torch.device) -> None:
    """Import another package's backend for this device, if there is one: it implements the ops from then on."""
    if device.type in _entry_points():
        _loaded(device.type)


def layout_for(device: torch.device, fmt: str) -> Layout | None:
    """The layout that weights of this format are better brought into on this device; None where the canonical one is best."""
    return backend_for(device).layouts.get(fmt)


@cache
def _entry_points() -> dict[str, str]:
    """Device type -> the entry point's value, of backends in other packages for devices that mxdit has none for."""
    own = {backend.device for backend in _OWN}
    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in own}


def _listed(device: str) -> Backend:
    """The backend of another package, or one that says why it cannot be had: a list of backends is for all devices."""
    try:
        return _loaded(device)
    except BackendError as error:
        said = str(error)
        return Backend(name=_entry_points()[device], device=device, why_not=lambda: said)


@cache
def _loaded(device: str) -> Backend:
    """The backend of another package, imported. Raises BackendError where its entry point does not lead to one."""
    (point, *_) = entry_points(group=GROUP, name=device)
    try:
        found = point.load()
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library that does not load
        found = error
    if not isinstance(found, Backend) or found.device != device:
        raise BackendError(
            "an entry point that leads to no backend",
            where=f"{GROUP}: {device} = {point.value}",
            got=repr(found),
            expected=f"a mxdit.backends.Backend whose device is {device!r}",
            hint=f"Mend or uninstall the package {point.dist.name if point.dist else point.module}.",
        )
    return found


__all__ = ["GROUP", "REFERENCE", "Backend", "Layout", "backend_for", "backends", "import_backend_of", "layout_for"]
