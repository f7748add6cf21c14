"""Backends: who can answer the ops on which device, and why not.

A backend registers its kernels on `mxdit.ops.LIBRARY` for its device type when it is imported; torch's dispatcher picks it.
The records here are for people, who see them in ``mxdit info``, and for layers, which ask for a weight's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mxdit.backends import ascend, cpu, cuda


@dataclass(frozen=True)
class Layout:
    """Another layout of a weight than the canonical one, which its device multiplies faster.

    Attributes:
        name: one of `mxdit.ops.LAYOUTS`.
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


CPU = Backend(name="cpu (native)", device="cpu", why_not=cpu.why_not, about=cpu.about)
ASCEND = Backend(
    name="ascend (torch_npu)",
    device="npu",
    why_not=ascend.why_not,
    rejects=ascend.rejects,
    about=ascend.about,
    layouts={"mxfp4_dualscale": Layout("nz", ascend.pack_nz, ascend.unpack_nz)},
)
CUDA = Backend(name="cuda (triton)", device="cuda", why_not=cuda.why_not, about=cuda.about)
REFERENCE = Backend(name="reference (torch)", device="any", why_not=lambda: None)


def backends() -> tuple[Backend, ...]:
    """Every backend that this installation knows, usable or not, the reference last."""
    return (CPU, CUDA, ASCEND, REFERENCE)


def layout_for(device: torch.device, fmt: str) -> Layout | None:
    """The layout that weights of this format are better brought into on this device; None where the canonical one is best."""
    for backend in backends():
        if backend.device == device.type and fmt in backend.layouts and backend.why_not() is None:
            return backend.layouts[fmt]
    return None
