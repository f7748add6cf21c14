"""What a guard lets pass, and what it says."""

from __future__ import annotations

from mxdit.calibrate.guards import SHRINKING, budget_guard, clip_guard, expert_guards, linear_guard
from mxdit.calibrate.linears import Calibrated, Trial
from mxdit.evals.velocities import Errors


def made(online: float, error: float) -> Calibrated:
    return Calibrated({}, error, 8.0, trials=[Trial("online", online, True), Trial("gptq", error, error < online)])


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


def test_what_a_budget_leaves_is_added_up_over_experts_and_must_be_less():
    def of(*steps: float) -> Errors:
        return Errors(0, 0, 0, 0, 0, dict(enumerate(steps)))

    before = {"transformer": of(0.1, 0.3), "transformer_2": of(0.6)}
    (guard,) = budget_guard(
        0.25, {"without the budget": before, "calibrated": {"transformer": of(0.1, 0.2), "transformer_2": of(0.0)}}
    )
    assert guard.passed and guard.calibrated == "30.0%, predicted 25.0%"
    (guard,) = budget_guard(0.25, {"without the budget": before, "calibrated": before})
    assert not guard.passed
    assert budget_guard(1.0, {"calibrated": before}) == []
