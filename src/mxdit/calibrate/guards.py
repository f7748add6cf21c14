"""What a calibration must not make worse.

A calibrator fools itself easily: a target that lowers every layer's error, and the velocity's at every recorded call, can make
clips worse. So errors are looked at as the sampler sees them, and clips last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mxdit.calibrate.linears import Calibrated
from mxdit.evals.metrics.statistics import difference
from mxdit.evals.velocities import Errors

# How much further than online a velocity may shrink. Recipes that spoiled clips shrank it by 0.02 to 0.04; one that shrank it by
# 0.013 gained as much as others (docs/log.md).
SHRINKING = 0.015


@dataclass(frozen=True)
class Guard:
    """One thing that a calibration must not make worse.

    Attributes:
        what: is looked at.
        online, calibrated: as quantizing online has it, and as the calibration does, in words.
        passed: the verdict.
        why: the rule.
    """

    what: str
    online: str
    calibrated: str
    passed: bool
    why: str


def linear_guard(linears: Mapping[str, Mapping[str, Calibrated]]) -> Guard:
    """No linear may have a larger error than online, on inputs that nothing was learned from."""
    every = [result for found in linears.values() for result in found.values()]
    worse = sum(not result.error <= result.online for result in every)  # what is no number is worse

    def mean(errors: Iterable[float]) -> str:
        return f"SQNR {-10 * np.mean([np.log10(max(error, 1e-30)) for error in errors]):.2f} dB"

    return Guard(
        "linears worse than online",
        mean(result.online for result in every),
        f"{worse} of {len(every)}, {mean(result.error for result in every)}",
        not worse,
        "none may be",
    )


def expert_guards(expert: str, online: Errors, calibrated: Errors) -> list[Guard]:
    """The errors of one transformer, single and summed up, must fall; its velocities must not shrink more."""

    def falls(name: str, what: str) -> Guard:
        before, after = getattr(online, name), getattr(calibrated, name)
        return Guard(f"{expert}: {what}", f"{before:.5f}", f"{after:.5f}", after < before, "must fall")

    def shrinks(name: str, what: str) -> Guard:
        before, after = getattr(online, name), getattr(calibrated, name)
        passed = after > min(before, 0.0) - SHRINKING
        return Guard(f"{expert}: {what}", f"{before:+.4f}", f"{after:+.4f}", passed, f"may fall by {SHRINKING}")

    return [
        falls("plain", "velocity error"),
        falls("accumulated", "guided error, summed over steps"),
        shrinks("slope", "slope along v"),
        shrinks("slope_guidance", "slope along the guidance"),
    ]


def budget_guard(predicted: float, errors: Mapping[str, Mapping[str, Errors]]) -> list[Guard]:
    """What more bits for some linears leave of the error must be less than the whole. Empty where none have them.

    The first-order prediction stands beside what was measured: they agree as far as errors of linears add up.

    Args:
        predicted: the share that was expected to be left.
        errors: of "calibrated", and of the same linears "without the budget" -> expert -> errors.
    """
    if "without the budget" not in errors:
        return []
    before, after = (
        sum(sum(of.steps.values()) for of in errors[what].values()) for what in ("without the budget", "calibrated")
    )
    left = after / before if before else 1.0
    return [
        Guard("error that the budget leaves", "100 %", f"{left:.1%}, predicted {predicted:.1%}", left < 1, "must fall")
    ]


def clip_guard(online: Sequence[float], calibrated: Sequence[float]) -> Guard:
    """Clips must be nearer to the float model's than online ones: the mean of the paired gains in PSNR."""
    gain = difference(calibrated, online)
    spread = "" if gain["lo"] is None else f" ({gain['lo']:+.2f} to {gain['hi']:+.2f})"
    return Guard(
        f"{len(online)} clips, PSNR",
        f"{np.mean(online):.2f} dB",
        f"{np.mean(calibrated):.2f} dB, {gain['mean']:+.2f}{spread}",
        gain["mean"] > 0,
        "must rise on the mean",
    )
