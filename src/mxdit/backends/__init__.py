"""Backends: who can answer the ops on which device, and why not.

A backend registers its kernels on `mxdit.ops.LIBRARY` for its device type and appends nothing else: torch's
dispatcher picks it. The records here are for people: ``mxdit info`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``mxdit info`` calls it.
        device: the torch device type it answers on; ``any`` for the reference.
        why_not: None when it can run here, else the reason in words.
        rejects: (scheme, K, N) to None when it computes such a layer, else the reason in words; the reference answers
            then.
    """

    name: str
    device: str
    why_not: Callable[[], str | None]
    rejects: Callable[[str, int, int], str | None]


REFERENCE = Backend(name="reference (torch)", device="any", why_not=lambda: None, rejects=lambda scheme, k, n: None)


def backends() -> tuple[Backend, ...]:
    """Every backend that this installation knows, usable or not, the reference last."""
    return (REFERENCE,)
