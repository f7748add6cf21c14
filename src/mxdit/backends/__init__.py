"""Backends: who can answer the ops on which device, and why not.

A backend registers its kernels on `mxdit.ops.LIBRARY` for its device type when it is imported; torch's dispatcher picks it.
The records here are for people: ``mxdit info`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxdit.backends import cpu


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``mxdit info`` calls it.
        device: the torch device type it answers on; ``any`` for the reference.
        why_not: None when it can run here, else the reason in words.
        rejects: (scheme, K, N) to None when it computes such a layer, else the reason in words; the reference answers
            then.
        about: what it is made of here, in words, where it can run.
    """

    name: str
    device: str
    why_not: Callable[[], str | None]
    rejects: Callable[[str, int, int], str | None] = lambda scheme, k, n: None
    about: Callable[[], str] = lambda: "usable"


CPU = Backend(name="cpu (native)", device="cpu", why_not=cpu.why_not, about=cpu.about)
REFERENCE = Backend(name="reference (torch)", device="any", why_not=lambda: None)


def backends() -> tuple[Backend, ...]:
    """Every backend that this installation knows, usable or not, the reference last."""
    return (CPU, REFERENCE)
