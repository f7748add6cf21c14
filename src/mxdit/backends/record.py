"""What a backend says of itself: `Backend` and `Layout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a device likes a weight to lie in memory, where that is not the canonical way.

    Attributes:
        name: one of `mxdit.ops.products.MEMORY_LAYOUTS`.
        pack: canonical codes (N, K/2) uint8 to that layout, on the same device.
        unpack: the inverse.
    """

    name: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``mxdit info`` calls it.
        device: the torch device type it answers on; ``any`` for the reference.
        why_not: None when it can run here, else the reason in words; the reference answers then.
        rejects: (scheme, K, N) to None, or the reason in words why it refuses layers of that shape; its ops raise it.
        about: what it is made of here, in words, where it can run.
        layouts: by format, the layout that its weights are better brought into.
    """

    name: str
    device: str
    why_not: Callable[[], str | None]
    rejects: Callable[[str, int, int], str | None] = lambda scheme, k, n: None
    about: Callable[[], str] = lambda: "usable"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
