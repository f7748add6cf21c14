"""Guards on made-up velocities: what adds up over steps, what averages out, and what a verdict says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mxdit.calibrate.guards import (
    SHRINKING,
    Errors,
    clip_guard,
    errors_of,
    expert_guards,
    linear_guard,
    step_lengths,
)
from mxdit.calibrate.linears import Calibrated, Trial
from mxdit.errors import InputError

TIMES = (1000.0, 900.0, 700.0, 400.0)
LENGTHS = (0.1, 0.2, 0.3, 0.4)
GUIDANCE = 4.0


def clip(*, guided: bool = True, size: int = 4000, expert: str = "transformer") -> list[dict]:
    """Calls of a clip: random velocities at every step, the conditional one first."""
    return [
        {"step": step, "timestep": time, "expert": expert, "velocity": torch.randn(1, 1, size)}
        for step, time in enumerate(TIMES)
        for _ in range(2 if guided else 1)
    ]


def errors(calls: list[dict], given: list[torch.Tensor], guidance: float = GUIDANCE) -> Errors:
    return errors_of([(calls, given)], "transformer", guidance)


def vectors(calls: list[dict]) -> np.ndarray:
    """(steps, branches, size) of a clip with guidance."""
    return torch.cat([call["velocity"] for call in calls]).double().numpy().reshape(len(TIMES), 2, -1)


def power(x: np.ndarray) -> np.ndarray:
    return (x**2).sum(-1)


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", (True, False))
@pytest.mark.parametrize("s", (-0.04, 0.5))
def test_velocities_that_are_scaled_have_that_slope_at_every_step_alike(guided, s):
    calls = clip(guided=guided)
    found = errors(calls, [(1 + s) * call["velocity"].double() for call in calls])
    assert found.plain == pytest.approx(s**2) and found.guided == pytest.approx(s**2)
    assert found.accumulated == pytest.approx(s**2)  # nothing of it averages out
    assert found.slope == pytest.approx(s)
    assert found.slope_guidance == pytest.approx(s if guided else 0)


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
    found = errors_of(zip((first, second), given, strict=True), "transformer", GUIDANCE)
    assert found.plain == pytest.approx((0.1**2 + 0.3**2) / 2) and found.accumulated == pytest.approx(found.plain)
    assert list(found.steps) == [0, 1] and 0.1 < found.slope < 0.3
    json.dumps(found.to_dict())


def test_no_call_of_an_expert_is_an_error():
    calls = clip()
    with pytest.raises(InputError, match="no call is this expert's"):
        errors_of([(calls, [])], "transformer_2", GUIDANCE)


def test_steps_go_as_far_as_the_schedule_and_end_at_nothing():
    calls = clip()
    assert step_lengths(calls) == pytest.approx(dict(enumerate(LENGTHS)))
    assert step_lengths(calls[::-1]) == step_lengths(calls)
    late = [call for call in calls if call["step"] > 1]
    assert step_lengths(late) == pytest.approx({2: 0.3, 3: 0.4})


# -- verdicts --------------------------------------------------------------------------------------------------------------


def made(online: float, error: float) -> Calibrated:
    return Calibrated({}, error, trials=[Trial("online", online, True), Trial("gptq", error, error < online)])


def test_one_linear_that_is_worse_is_one_too_many():
    good = {"a": {"x": made(0.01, 0.001), "y": made(0.01, 0.01)}, "b": {"x": made(0.0, 0.0)}}
    guard = linear_guard({"a": good["a"]})
    assert guard.passed and guard.online == "SQNR 20.00 dB" and guard.calibrated == "0 of 2, SQNR 25.00 dB"
    assert linear_guard(good).passed  # of a weight of zeros there is no decibel
    good["b"]["x"] = made(0.01, 0.0100001)
    assert not linear_guard(good).passed and linear_guard(good).calibrated.startswith("1 of 3")


def measured(plain=0.02, accumulated=0.01, slope=-0.005, slope_guidance=0.003) -> Errors:
    return Errors(plain, 0.05, accumulated, slope, slope_guidance, {})


def verdicts(online: Errors, calibrated: Errors) -> list[bool]:
    return [guard.passed for guard in expert_guards("transformer", online, calibrated)]


def test_errors_must_fall_and_velocities_must_not_shrink_further():
    online = measured()
    assert verdicts(online, measured(0.019, 0.009)) == [True] * 4
    assert verdicts(online, online) == [False, False, True, True]
    assert verdicts(online, measured(0.021, 0.009)) == [False, True, True, True]
    assert verdicts(online, measured(0.019, 0.011)) == [True, False, True, True]
    assert verdicts(online, measured(0.019, 0.009, slope=-0.0051 - SHRINKING)) == [True, True, False, True]
    assert verdicts(online, measured(0.019, 0.009, slope=-0.0049 - SHRINKING)) == [True] * 4
    # What grows online may become nothing, and shrink as far as what was exact.
    assert verdicts(online, measured(0.019, 0.009, slope_guidance=0.0001 - SHRINKING)) == [True] * 4
    assert verdicts(online, measured(0.019, 0.009, slope_guidance=-0.0001 - SHRINKING)) == [True, True, True, False]
    assert verdicts(online, measured(0.019, 0.009, slope=0.5, slope_guidance=0.5)) == [True] * 4


def test_what_is_no_number_passes_nothing():
    nothing = measured(*[float("nan")] * 4)
    assert verdicts(measured(), nothing) == [False] * 4
    assert not linear_guard({"a": {"x": made(0.01, float("nan"))}}).passed


def test_clips_must_gain_on_the_mean():
    guard = clip_guard([20.0, 30.0, 25.0], [21.0, 29.5, 25.0])
    assert (
        guard.passed and guard.online == "25.00 dB" and guard.calibrated == "25.17 dB, +0.17"
    )  # too few for an interval
    assert not clip_guard([20.0, 30.0], [20.0, 30.0]).passed and not clip_guard([20.0, 30.0], [21.0, 28.9]).passed
    many = clip_guard([20.0] * 8, [20.0 + i for i in range(8)])
    assert many.passed and many.what == "8 clips, PSNR" and many.calibrated.startswith("23.50 dB, +3.50 (+")
