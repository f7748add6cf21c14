"""The modes that are measured beside BF16, and one model's directories in each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mxdit.backends.carrier import slow_bfloat16
from mxdit.checkpoint import quantize_checkpoint
from mxdit.generation.session import Session

BF16, FP32 = "bf16", "fp32"
CARRIERS = {BF16: torch.bfloat16, FP32: torch.float32}  # of what is not quantized
MODES = {  # the weight's format and the activation
    "mxfp4": ("mxfp4", "mxfp4"),
    "mxfp4_dualscale": ("mxfp4_dualscale", "mxfp4"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "w4a8": ("mxfp4", "mxfp8"),
    "w4a16": ("mxfp4", "bf16"),
}
METHODS = ("mxfp8", "mxfp4", "mxfp4_dualscale")  # formats of weights: what memory and loading depend on


def baseline(device: str) -> str:
    """What speed is compared with on that device: "bf16", or "fp32" on a CPU where torch's BF16 is the slower one."""
    return FP32 if slow_bfloat16(device) else BF16


@dataclass(frozen=True)
class Variant:
    """A directory and what is made of it while it loads.

    Attributes:
        name: "bf16", "mxfp4 online", "mxfp4 offline", ..., or "as stored" for a model that is given quantized.
        path: the directory that is loaded.
        method: what its weights are quantized to while they load, None for as they are.
    """

    name: str
    path: Path
    method: str | None = None

    def session(self, task: str, device: str) -> Session:
        """What loads a pipeline's directory in this mode."""
        return Session.open(self.path, task=task, method=self.method, device=device)


def variants(
    path: Path, stored: bool, methods: Sequence[str], scratch: Path, tell: Callable[[str], None]
) -> list[Variant]:
    """What a checkpoint can be measured as: BF16, and every method online and offline.

    Args:
        path: a pipeline's directory, or one transformer's.
        stored: whether it is quantized already: then there is one way to load it.
        methods: of `METHODS`.
        scratch: directory where the offline checkpoints are written.
        tell: is told of each.
    """
    if stored:
        return [Variant("as stored", path)]
    found = [Variant(BF16, path)]
    for method in methods:
        tell(f"quantizing to {method}")
        quantize_checkpoint(path, scratch / method, method).write()
        found += [Variant(f"{method} online", path, method), Variant(f"{method} offline", scratch / method)]
    return found
