"""Smoothing: factors that move the spread of a layer's inputs into its weight, searched for with the operator that runs.

A smoothed layer computes Q(x * m) @ Q(W / m)^T with m = 1 / s (docs/numerics.md section 5.3). What s should be follows from how
large channels are: s = stat(x)^a / rms(W)^b. Which statistic and which exponents is tried out, layer by layer.

Source: Xiao et al., "SmoothQuant", 2022 (arXiv 2211.10438), whose s = max(x)^a / max(W)^(1-a) has one exponent and one
statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

STATISTICS = ("rms", "p99.9", "max")
EXPONENTS = ((0.25, 0.0), (0.5, 0.0), (0.25, 0.25), (0.5, 0.25), (0.5, 0.5), (0.75, 0.25), (0.75, 0.5))
LIMIT = 2.0**8  # factors lie between it and its inverse
_RARE = 1000  # one in so many is above p99.9


class Smoothing(NamedTuple):
    """One candidate: what it is called, and `mul_scale` (K,) fp32 that holds bf16 values, or None for none."""

    name: str
    mul_scale: Tensor | None


def candidates(x: Tensor, weight: Tensor) -> Iterator[Smoothing]:
    """No smoothing, and every statistic with every pair of exponents: 22 in all.

    Args:
        x: (T, K) inputs of the layer.
        weight: (N, K); of linears that share their input, all of them, one below the other.
    """
    yield Smoothing("none", None)
    magnitude, rows = x.float().abs(), max(1, round(len(x) / _RARE))
    tops = magnitude.topk(min(len(x), rows + 1), dim=0).values
    statistics = {"rms": magnitude.square().mean(0).sqrt(), "p99.9": tops[-1], "max": tops[0]}
    of_weight = weight.float().square().mean(0).sqrt()
    for name in STATISTICS:
        for a, b in EXPONENTS:
            yield Smoothing(f"{name}^{a:g}/w^{b:g}", mul_scale(statistics[name], of_weight, a, b))


def mul_scale(of_input: Tensor, of_weight: Tensor, a: float, b: float) -> Tensor:
    """m = 1 / s, s = of_input^a / of_weight^b with geometric mean 1; (K,) fp32, rounded to bf16.

    A channel that is never used, or whose weights are all zero, has the factor 1.
    """
    used = (of_input > 0) & (of_weight > 0)
    logs = a * of_input.double().clamp_min(1e-30).log2() - b * of_weight.double().clamp_min(1e-30).log2()
    logs = torch.where(used, logs, 0.0)
    middle = logs.sum() / used.sum().clamp_min(1)
    s = torch.where(used, logs - middle, 0.0).exp2().clamp(1 / LIMIT, LIMIT)
    return (1 / s).bfloat16().float()


def best(options: Iterator[Smoothing], error: Callable[[Tensor | None], float]) -> tuple[Smoothing, dict[str, float]]:
    """The candidate with the least error, the first of equal ones; and the error of each.

    Args:
        error: of the layer under a `mul_scale`, or under none.
    """
    found = {option.name: (error(option.mul_scale), option) for option in options}
    chosen = min(found.values(), key=lambda pair: pair[0])[1]
    return chosen, {name: value for name, (value, _) in found.items()}
