"""Which metrics of videos can be computed here, and which are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mxdit.errors import InputError
from mxdit.evals.metrics import networks
from mxdit.evals.metrics.video_metrics import VIDEO_METRICS, unavailable


class Metrics(NamedTuple):
    """Names of video metrics, names of `networks.ADAPTERS`, and what cannot be computed, with the reason."""

    video: tuple[str, ...]
    networks: tuple[str, ...]
    missing: dict[str, str]


def choose_metrics(names: Sequence[str] | None, weights: Path | None) -> Metrics:
    """The metrics that are named, or all that can be computed. Raises InputError for one that cannot be.

    Args:
        weights: where the weights of the networks are.
    """
    adapters = networks.ADAPTERS
    missing = unavailable() | {name: why for name in adapters if (why := adapters[name].why_not(weights))}
    possible = [name for name in (*VIDEO_METRICS, *adapters) if name not in missing]
    chosen = possible if names is None else names
    for name in chosen:
        if name not in possible:
            raise InputError(
                f"{name} cannot be computed",
                field="metrics",
                got=missing.get(name, repr(name)),
                expected=", ".join(possible),
            )
    video = tuple(name for name in chosen if name in VIDEO_METRICS)
    return Metrics(video, tuple(name for name in chosen if name in adapters), missing)
