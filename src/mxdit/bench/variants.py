"""One model's directories in every mode: BF16, and each method online and offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mxdit.bench.modes import BF16
from mxdit.checkpoint import quantize_checkpoint
from mxdit.generation.session import Session


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
