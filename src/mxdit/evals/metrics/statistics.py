"""Means with bootstrap intervals: how much of a difference is more than the choice of samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mxdit.errors import InputError

LEAST = 6  # groups: of fewer, all differences have one sign by chance more often than once in 20
CONFIDENCE = 0.95  # share of the resampled means that lie between lo and hi


def interval(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The mean, and the 95 % percentile bootstrap interval (Efron, 1979) around it: {"mean", "lo", "hi", "n"}.

    Fewer than `LEAST` groups say nothing about the spread: lo and hi are None. A share of 0/1 values is a mean like any other;
    where all are 1 its interval has no width, which is not certainty.

    Args:
        values: one number a sample, all finite.
        groups: what the samples have in common (the prompt, where each has several seeds). Whole groups are drawn then:
            samples of one prompt resemble each other, and drawn singly they would claim too narrow an interval.
        resamples, seed: how many, and of what generator. The same seed draws the same samples for every mode.

    Raises InputError for no values, or one that is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise InputError("no mean of these values", got=list(values), expected="one finite number or more")
    names = {name: i for i, name in enumerate(dict.fromkeys(groups if groups is not None else range(data.size)))}
    member = np.arange(data.size) if groups is None else np.array([names[name] for name in groups])
    mean = float(data.mean())
    if len(names) < LEAST:
        return {"mean": mean, "lo": None, "hi": None, "n": int(data.size)}
    sums, counts = np.bincount(member, weights=data), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    # Rounding in the sums must not put the mean of equal values outside its own interval.
    return {"mean": mean, "lo": min(float(low), mean), "hi": max(float(high), mean), "n": int(data.size)}


def difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much more `a` is than `b`, sample by sample: `interval` of a[i] - b[i].

    Paired, because modes share prompts and seeds: what makes a prompt hard for both cancels, and small differences show.
    """
    if len(a) != len(b):
        raise InputError("paired samples differ in number", got=f"{len(a)} and {len(b)}")
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    return interval(pairs, groups=groups, resamples=resamples, seed=seed)
