"""Timing calls beside each other: in every round one of each, so that all see the same machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T", Tensor, nn.Module)

WARM = 0.1  # seconds at least of calls that do not count
MOST = 64  # copies
EVICT = 256 << 20  # bytes: more than an accelerator's cache

Call = Callable[[], object]
Timer = Callable[[Call], float]


@dataclass(frozen=True)
class Times:
    """Seconds of one call, over all rounds.

    Attributes:
        median, minimum: of the rounds.
        spread: the interquartile range: half of the rounds lie in a stretch this wide around the median.
        rounds: how many there were.
    """

    median: float
    minimum: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """What the rounds of one call took."""
        low, middle, high = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return cls(middle, min(seconds), high - low, len(seconds))


def timer(device: torch.device) -> Timer:
    """What times one call on that device.

    An accelerator's own events are read. Before the first of them a write of `EVICT` bytes is queued: it takes the last call's
    operands out of the cache, and while it runs the host gets ahead, so that launching is not what is measured.
    """
    if device.type == "cpu":
        return _wall
    module = torch.get_device_module(device)
    other = torch.empty(EVICT, dtype=torch.uint8, device=device)

    def on_device(call: Call) -> float:
        start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
        stream = module.current_stream(device)  # without it an event goes to the current device, which may be another
        other.zero_()
        start.record(stream)
        call()
        end.record(stream)
        module.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return on_device


def _wall(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(calls: Sequence[Sequence[Call]], rounds: int, timed: Timer = _wall) -> list[tuple[float, ...]]:
    """Seconds of every call in every round, one tuple for each of ``calls``.

    Each of ``calls`` is the same call over different copies of its operands, which take turns. Rounds that do not count come
    first, for `WARM` seconds: until the allocator, too, has what short calls need.
    """
    rotations = [cycle(copies) for copies in calls]

    def one_round() -> list[float]:
        return [timed(next(rotation)) for rotation in rotations]

    warm = time.perf_counter() + WARM
    one_round()
    while time.perf_counter() < warm:
        one_round()
    return list(zip(*(one_round() for _ in range(rounds)), strict=True))


def rotated(thing: _T, count: int | None = None) -> list[_T]:
    """Copies of a tensor or module, ``count`` or as many as exceed the CPU's last-level cache four times, so that taking turns
    they come from memory; of what is so small that `MOST` of them do not, a cache would hold a model's in any case. On an
    accelerator one is enough: its `timer` empties the cache."""
    tensors = [thing] if isinstance(thing, Tensor) else list(thing.state_dict().values())
    if tensors[0].device.type != "cpu":
        return [thing]
    size = sum(tensor.nbytes for tensor in tensors)
    return [copy.deepcopy(thing) for _ in range(count or min(MOST, max(2, -(-4 * last_cache() // size))))]


def caches() -> dict[str, int]:
    """Bytes of the caches that the first CPU sees, where the system tells."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue  # virtual machines may hide them
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def last_cache() -> int:
    """Bytes of the CPU's last-level cache, 32 MiB where the system does not tell."""
    return max(caches().values(), default=32 << 20)
