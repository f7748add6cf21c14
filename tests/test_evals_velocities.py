"""Errors of made-up velocities: what adds up over steps, and what averages out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mxdit.errors import InputError
from mxdit.evals.velocities import Errors, errors_of, guidance_of, step_lengths

TIMES = (1000.0, 900.0, 700.0, 400.0)
LENGTHS = (0.1, 0.2, 0.3, 0.4)
GUIDANCE = 4.0


def clip(*, guided: bool = True, size: int = 4000, expert: str = "transformer") -> list[dict]:
    """Calls of a clip: random velocities at every step, the conditional one first."""
    return [
        {"step": step, "timestep": time, "expert": expert, "guidance_added": 0.0, "velocity": torch.randn(1, 1, size)}
        for step, time in enumerate(TIMES)
        for _ in range(2 if guided else 1)
    ]


def errors(calls: list[dict], given: list[torch.Tensor], guidance: float = GUIDANCE) -> Errors:
    return errors_of([(calls, given)], {"transformer": guidance}, {"transformer"})


def vectors(calls: list[dict]) -> np.ndarray:
    """(steps, branches, size) of a clip with guidance."""
    return torch.cat([call["velocity"] for call in calls]).double().numpy().reshape(len(TIMES), 2, -1)


def power(x: np.ndarray) -> np.ndarray:
    return (x**2).sum(-1)


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("s", (-0.04, 0.5))
def test_velocities_that_are_scaled_have_that_slope_at_every_step_alike(guided, s):
    calls = clip(guided=guided)
    found = errors(calls, [(1 + s) * call["velocity"].double() for call in calls])
    assert found.plain == pytest.approx(s**2) and found.guided == pytest.approx(s**2)
    assert found.accumulated == pytest.approx(s**2)  # nothing of it averages out
    assert found.slope == pytest.approx(s)
    assert found.slope_guidance == pytest.approx(s if guided else 0)


@pytest.mark.parametrize("prompt_first", (True, False))
def test_a_call_of_both_branches_is_as_two_calls(prompt_first):
    calls = clip()
    given = [call["velocity"] + 0.1 * torch.randn_like(call["velocity"]) for call in calls]

    def joined(two: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(two if prompt_first else two[::-1])

    both = [
        {**first, "velocity": joined([first["velocity"], second["velocity"]]), "prompt_first": prompt_first}
        for first, second in zip(calls[::2], calls[1::2], strict=True)
    ]
    pairs = [joined([first, second]) for first, second in zip(given[::2], given[1::2], strict=True)]
    assert errors(both, pairs) == errors(calls, given)


def test_velocities_that_are_exact_have_no_error():
    calls = clip()
    found = errors(calls, [call["velocity"] for call in calls])
    assert found == Errors(0, 0, 0, 0, 0, dict.fromkeys(range(4), 0.0))


def test_a_random_error_averages_out_and_a_constant_one_does_not():
    calls, constant = clip(guided=False), torch.randn(1, 1, 4000)
    for call in calls:
        call["velocity"] = calls[0]["velocity"]  # straight, as flow matching wants it
    random = errors(calls, [call["velocity"] + 0.1 * torch.randn(1, 1, 4000) for call in calls])
    same = errors(calls, [call["velocity"] + 0.1 * constant for call in calls])
    assert random.plain == pytest.approx(0.01, rel=0.1) and same.plain == pytest.approx(0.01, rel=0.1)
    assert same.accumulated == pytest.approx(same.plain)
    assert random.accumulated == pytest.approx(random.plain * sum(d**2 for d in LENGTHS), rel=0.1)


def test_guidance_is_mixed_as_the_sampler_mixes_it():
    calls = clip()
    noise = 0.1 * torch.randn(8, 1, 4000).double()
    found = errors(calls, [call["velocity"].double() + e for call, e in zip(calls, noise.split(1), strict=True)])
    v, e = vectors(calls), noise.numpy().reshape(4, 2, -1)
    mixed, strayed = ((1 - GUIDANCE) * x[:, 1] + GUIDANCE * x[:, 0] for x in (v, e))
    assert found.plain == pytest.approx((power(e) / power(v)).mean())
    assert found.guided == pytest.approx((power(strayed) / power(mixed)).mean())
    lengths = np.array(LENGTHS)[:, None]
    way = power((lengths * mixed).sum(0))
    assert found.accumulated == pytest.approx(power((lengths * strayed).sum(0)) / way)
    assert found.steps == pytest.approx(dict(enumerate(power(lengths * strayed) / way)))


def test_an_error_of_both_branches_alike_shows_in_no_guidance():
    calls = clip()
    given = [call["velocity"].double() for call in calls]
    for i in range(0, 8, 2):  # both branches move along the conditional one
        for branch in (i, i + 1):
            given[branch] = given[branch] - 0.1 * calls[i]["velocity"].double()
    found = errors(calls, given)
    assert found.slope == pytest.approx(-0.1) and found.slope_guidance == pytest.approx(0)
    shrunk = [call["velocity"].double() for call in calls]
    for i in range(0, 8, 2):  # the conditional one moves toward the other
        shrunk[i] = shrunk[i] - 0.1 * (shrunk[i] - shrunk[i + 1])
    found = errors(calls, shrunk)
    assert found.slope_guidance == pytest.approx(-0.1)


def test_the_conditional_branch_alone_counts_in_the_slope():
    calls = clip()
    found = errors(calls, [call["velocity"].double() * (1.2 if i % 2 else 1.0) for i, call in enumerate(calls)])
    assert found.slope == 0 and found.plain == pytest.approx(0.02)


def test_clips_are_averaged_and_other_experts_calls_are_left_out():
    first, second = clip(), clip()
    for calls in (first, second):
        for call in calls:
            call["expert"] = "transformer" if call["step"] < 2 else "transformer_2"
    mine = [[call for call in calls if call["expert"] == "transformer"] for calls in (first, second)]
    given = [[(1 + s) * call["velocity"].double() for call in calls] for s, calls in zip((0.1, 0.3), mine, strict=True)]
    guidance = {"transformer": GUIDANCE, "transformer_2": 1.0}
    found = errors_of(zip((first, second), given, strict=True), guidance, {"transformer"})
    assert found.plain == pytest.approx((0.1**2 + 0.3**2) / 2) and found.accumulated == pytest.approx(found.plain)
    assert list(found.steps) == [0, 1] and 0.1 < found.slope < 0.3
    json.dumps(found.to_dict())


def test_no_call_of_an_expert_is_an_error():
    calls = clip()
    with pytest.raises(InputError, match="no call is this expert's"):
        errors_of([(calls, [])], {"transformer": GUIDANCE}, {"transformer_2"})


def test_steps_go_as_far_as_the_schedule_and_end_at_nothing():
    calls = clip()
    assert step_lengths(calls) == pytest.approx(dict(enumerate(LENGTHS)))
    assert step_lengths(calls[::-1]) == step_lengths(calls)
    late = [call for call in calls if call["step"] > 1]
    assert step_lengths(late) == pytest.approx({2: 0.3, 3: 0.4})


def test_each_expert_has_its_own_guidance_and_both_add_up_in_one_clip():
    calls = clip()
    for call in calls:
        call["expert"] = "transformer" if call["step"] < 2 else "transformer_2"
    noise = 0.1 * torch.randn(8, 1, 4000).double()
    given = [call["velocity"].double() + e for call, e in zip(calls, noise.split(1), strict=True)]
    guidance = {"transformer": 2.0, "transformer_2": 5.0}
    found = errors_of([(calls, given)], guidance, guidance)
    v, e = vectors(calls), noise.numpy().reshape(4, 2, -1)
    scale = np.array([2.0, 2.0, 5.0, 5.0])[:, None]
    mixed, strayed = ((1 - scale) * x[:, 1] + scale * x[:, 0] for x in (v, e))
    lengths = np.array(LENGTHS)[:, None]
    assert found.guided == pytest.approx((power(strayed) / power(mixed)).mean())
    assert found.accumulated == pytest.approx(power((lengths * strayed).sum(0)) / power((lengths * mixed).sum(0)))
    assert found.steps == pytest.approx(dict(enumerate(power(lengths * strayed) / power((lengths * mixed).sum(0)))))
    # Of one expert: its own way for what adds up, the whole clip's for its steps.
    alone = errors_of([(calls, given[4:])], guidance, {"transformer_2"})
    assert alone.steps == pytest.approx({step: found.steps[step] for step in (2, 3)})
    late = slice(2, None)
    assert alone.accumulated == pytest.approx(
        power((lengths * strayed)[late].sum(0)) / power((lengths * mixed)[late].sum(0))
    )


@pytest.mark.parametrize(
    "guidance, second, expected",
    [
        (4.0, 3.0, {"transformer": 4.0, "transformer_2": 3.0}),
        (4.0, None, {"transformer": 4.0, "transformer_2": 4.0}),
        (None, None, {"transformer": 1.0, "transformer_2": 1.0}),
    ],
)
def test_the_second_expert_has_the_second_guidance_or_the_first(guidance, second, expected):
    request = SimpleNamespace(guidance=guidance, guidance_2=second)
    assert guidance_of(request, ["transformer", "transformer_2"]) == expected
