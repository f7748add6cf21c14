"""How far velocities are from the float model's on recorded calls, as the sampler sees them: guided, and summed over the steps.

An error that points the same way at every step adds up, and a random one does not, so that the error of single calls can fall
while clips get worse. Hence the sums, and how much of an error lies along the velocity itself.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mxdit.errors import InputError
from mxdit.generation.request import Request


@dataclass(frozen=True)
class Errors:
    """Errors of velocities on recorded calls, teacher forced: each is the mean over clips.

    Attributes:
        plain: ||v_q - v||^2 / ||v||^2 of single calls.
        guided: the same of v_u + g (v_c - v_u), which the sampler follows.
        accumulated: the same of the sum over these steps of dt times the guided velocity: what survives adding up.
        slope: least-squares factor of the conditional error on v_c. Below zero, velocities shrink at every step alike.
        slope_guidance: the same of the error of v_c - v_u on it.
        steps: step -> guided error times dt^2, over the power of the whole clip's way, all experts' steps together: its part in
            the end, as it can be compared and added across experts.
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


def errors_of(
    clips: Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Tensor]]],
    guidance: Mapping[str, float],
    experts: Container[str],
) -> Errors:
    """Errors over clips.

    Args:
        clips: for each, its calls of all experts, in order, and the velocities that the model at hand gave to those of `experts`.
        guidance: expert -> scale with which the calls were made, for all.
        experts: whose errors are asked for.

    Raises InputError where no call does.
    """
    sums: dict[str, list[float]] = {"plain": [], "guided": [], "accumulated": []}
    along, across = [0.0, 0.0], [0.0, 0.0]
    steps: dict[int, list[float]] = {}
    for calls, velocities in clips:
        given = iter(velocities)
        intervals = step_lengths(calls)
        recorded, pairs = dict[int, list[Tensor]](), dict[int, list[tuple[Tensor, Tensor]]]()
        for call in calls:
            exact = branches_of(call["velocity"].double(), call)
            recorded.setdefault(call["step"], []).extend(exact)
            if call["expert"] in experts:
                ours = branches_of(next(given).double().cpu(), call)
                pairs.setdefault(call["step"], []).extend(zip(exact, ours, strict=True))
        if not pairs:
            continue
        way, strayed, whole = torch.zeros(()), torch.zeros(()), torch.zeros(())
        parts = dict[int, float]()
        scales = {call["step"]: guidance[call["expert"]] + call["guidance_added"] for call in calls}
        for step, branches in recorded.items():
            whole = whole + intervals[step] * _guided(branches, scales[step])
        for step, both in pairs.items():
            exact, ours = (_guided(of, scales[step]) for of in zip(*both, strict=True))
            sums["plain"] += [_share(v, q) for v, q in both]
            sums["guided"].append(_share(exact, ours))
            way, strayed = way + intervals[step] * exact, strayed + intervals[step] * (ours - exact)
            parts[step] = float((intervals[step] * (ours - exact)).square().sum())
            _add(along, *both[0])
            if len(both) > 1:
                _add(across, both[0][0] - both[1][0], both[0][1] - both[1][1])
        sums["accumulated"].append(float(strayed.square().sum() / way.square().sum()))
        for step, part in parts.items():
            steps.setdefault(step, []).append(part / float(whole.square().sum()))
    if not steps:
        raise InputError("no call is this expert's", where=str(experts), hint="Record more captions or steps.")
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    return Errors(
        **means,
        slope=along[0] / along[1],
        slope_guidance=across[0] / across[1] if across[1] else 0.0,
        steps={step: sum(values) / len(values) for step, values in sorted(steps.items())},
    )


def step_lengths(calls: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """step -> how far it goes along the noise schedule, in units of the whole; of all steps together 1 at most."""
    times = {call["step"]: call["timestep"] / 1000 for call in calls}
    ordered = sorted(times)
    after = [*(times[step] for step in ordered[1:]), 0.0]
    return {step: times[step] - end for step, end in zip(ordered, after, strict=True)}


def branches_of(velocity: Tensor, call: Mapping[str, Any]) -> list[Tensor]:
    """What one call gave for the prompt, and then, where it has both branches of guidance, for the negative one."""
    if len(velocity) == 1:
        return [velocity]
    first, second = velocity.chunk(2)
    return [first, second] if call["prompt_first"] else [second, first]


def _guided(velocities: Sequence[Tensor], guidance: float) -> Tensor:
    """As a pipeline mixes the conditional velocity, which is first, and the unconditional one (LTX-2 has more of them)."""
    if len(velocities) == 1:
        return velocities[0]
    conditional, unconditional, *_ = velocities
    return unconditional + guidance * (conditional - unconditional)


def _share(exact: Tensor, ours: Tensor) -> float:
    return float((ours - exact).square().sum() / exact.square().sum())


def _add(sums: list[float], exact: Tensor, ours: Tensor) -> None:
    sums[0] += float(((ours - exact) * exact).sum())
    sums[1] += float(exact.square().sum())


def guidance_of(request: Request, experts: Iterable[str]) -> dict[str, float]:
    """Expert, in the order in which they run -> the guidance scale that a request has while it is in charge; 1 for none."""
    second = request.guidance if request.guidance_2 is None else request.guidance_2
    scales = {name: second if number else request.guidance for number, name in enumerate(experts)}
    return {name: 1.0 if scale is None else scale for name, scale in scales.items()}
