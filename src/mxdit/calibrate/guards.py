"""What an expert's error adds up to over a clip: figures that a calibration must not make worse.

A calibrator fools itself easily: a target that lowers every layer's error, and the velocity's at every recorded call, can make
clips worse, because an error that points the same way at every step adds up, and a random one does not. So errors are looked at
as the sampler sees them: with guidance, summed over the steps, and by how much of them lies along the velocity itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from mxdit.calibrate.linears import Calibrated
from mxdit.calibrate.walk import Call
from mxdit.errors import InputError
from mxdit.evals.metrics.statistics import difference

SHRINKING = (
    0.01  # how much further than online a velocity may shrink; recipes that spoiled clips shrank it by 0.02 to 0.04
)


@dataclass(frozen=True)
class Errors:
    """Errors of one expert's velocities on recorded calls, teacher forced: each is the mean over clips.

    Attributes:
        plain: ||v_q - v||^2 / ||v||^2 of single calls.
        guided: the same of v_u + g (v_c - v_u), which the sampler follows.
        accumulated: the same of the sum over an expert's steps of dt times the guided velocity: what survives adding up.
        slope: least-squares factor of the conditional error on v_c. Below zero, velocities shrink at every step alike.
        slope_guidance: the same of the error of v_c - v_u on it.
        steps: step -> guided error times dt^2, over the power of the clip's whole way: its part in the end.
    """

    plain: float
    guided: float
    accumulated: float
    slope: float
    slope_guidance: float
    steps: dict[int, float]

    def to_dict(self) -> dict[str, object]:
        """JSON-serializable."""
        return asdict(self)


def errors_of(clips: Iterable[tuple[Sequence[Call], Sequence[Tensor]]], expert: str, guidance: float) -> Errors:
    """Errors of an expert over clips.

    Args:
        clips: for each, its calls of all experts, in order, and the velocities that the model at hand gave to those of `expert`.
        guidance: scale of this expert, with which the calls were made.

    Raises InputError where no call is the expert's.
    """
    sums: dict[str, list[float]] = {"plain": [], "guided": [], "accumulated": []}
    along, across = [0.0, 0.0], [0.0, 0.0]
    steps: dict[int, list[float]] = {}
    for calls, velocities in clips:
        given = iter(velocities)
        intervals = step_lengths(calls)
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for call in calls:
            if call["expert"] == expert:
                pairs.setdefault(call["step"], []).append((call["velocity"].double(), next(given).double().cpu()))
        if not pairs:
            continue
        way, strayed = torch.zeros(()), torch.zeros(())
        parts = dict[int, float]()
        for step, both in pairs.items():
            exact, ours = _guided([v for v, _ in both], guidance), _guided([v for _, v in both], guidance)
            sums["plain"] += [_share(v, q) for v, q in both]
            sums["guided"].append(_share(exact, ours))
            way, strayed = way + intervals[step] * exact, strayed + intervals[step] * (ours - exact)
            parts[step] = float((intervals[step] * (ours - exact)).square().sum())
            _add(along, *both[0])
            if len(both) > 1:
                _add(across, both[0][0] - both[1][0], both[0][1] - both[1][1])
        power = float(way.square().sum())
        sums["accumulated"].append(float(strayed.square().sum()) / power)
        for step, part in parts.items():
            steps.setdefault(step, []).append(part / power)
    if not steps:
        raise InputError("no call is this expert's", where=expert, hint="Record more captions or steps.")
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    return Errors(
        **means,
        slope=along[0] / along[1],
        slope_guidance=across[0] / across[1] if across[1] else 0.0,
        steps={step: sum(values) / len(values) for step, values in sorted(steps.items())},
    )


def step_lengths(calls: Sequence[Call]) -> dict[int, float]:
    """step -> how far it goes along the noise schedule, in units of the whole; of all steps together 1 at most."""
    times = {call["step"]: call["timestep"] / 1000 for call in calls}
    ordered = sorted(times)
    after = [*(times[step] for step in ordered[1:]), 0.0]
    return {step: times[step] - end for step, end in zip(ordered, after, strict=True)}


def _guided(velocities: Sequence[Tensor], guidance: float) -> Tensor:
    """As a pipeline mixes the conditional velocity, which is first, and the unconditional one."""
    if len(velocities) == 1:
        return velocities[0]
    conditional, unconditional = velocities
    return unconditional + guidance * (conditional - unconditional)


def _share(exact: Tensor, ours: Tensor) -> float:
    return float((ours - exact).square().sum() / exact.square().sum())


def _add(sums: list[float], exact: Tensor, ours: Tensor) -> None:
    sums[0] += float(((ours - exact) * exact).sum())
    sums[1] += float(exact.square().sum())


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
