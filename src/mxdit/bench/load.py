"""``mxdit bench load``: how long a pipeline takes to load, quantized on the way or before."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mxdit.bench.memory import weight_files
from mxdit.bench.processes import alone
from mxdit.bench.timing import Times
from mxdit.bench.variants import Variant, variants
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.loading import show_loading


@dataclass(frozen=True)
class LoadTime:
    """What loading took.

    Attributes:
        mode: the `Variant`'s name.
        files: bytes of all weights. On a CPU a quantized file is mapped, and read when it is first multiplied.
        first: seconds of the first load in a fresh process, imports of diffusers and transformers included.
        times: seconds of those after it.
    """

    mode: str
    files: int
    first: float
    times: Times


def run(
    model: ModelDirectory,
    task: str,
    methods: Sequence[str],
    rounds: int,
    scratch: Path,
    device: str,
    tell: Callable[[str], None],
) -> Iterator[LoadTime]:
    """Load a pipeline in every mode, each in a process of its own; see `mxdit.bench.memory.measure` for the arguments.

    Files that were just read or written are in the system's cache, so this is no measure of a disk.
    """
    for variant in variants(model.path, bool(model.stored), methods, scratch, tell):
        tell(variant.name)
        first, *seconds = alone(_loads, variant, task, rounds, device)
        yield LoadTime(variant.name, weight_files(variant.path), first, Times.of(seconds))


def _loads(variant: Variant, task: str, rounds: int, device: str) -> list[float]:
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        show_loading(False)
        session = variant.session(task, device)
        session.load()
        if device != "cpu":
            torch.get_device_module(device).synchronize(device)
        seconds.append(time.perf_counter() - started)
        del session
        gc.collect()
    return seconds
