"""The calibration of linears: what it reports is what the layer then does, and no step stays that made it worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mxdit
from mxdit.calibrate import linears as module
from mxdit.calibrate.linears import DEFAULT, STEPS, Calibrated, Recipe, calibrate
from mxdit.calibrate.report import summary
from mxdit.calibrate.scales import search
from mxdit.errors import ConfigError, FormatError, InputError
from mxdit.numerics.formats import SCHEMES, block_format

pytestmark = pytest.mark.slow

PAIRS = [(method, row.activation, None) for row in SCHEMES.values() for method in row.weights]
recipes = pytest.mark.parametrize("method, activation, rule", [*PAIRS, ("mxfp4", "mxfp4", "even7")])
METHODS = ("mxfp4", "mxfp4_dualscale", "mxfp8")
methods = pytest.mark.parametrize("method", METHODS)


def group(k: int = 576, sizes: tuple[int, ...] = (24, 24, 16), bias: bool = True) -> dict[str, nn.Linear]:
    """Linears that share an input."""
    return {f"to_{i}": nn.Linear(k, n, bias=bias).bfloat16() for i, n in enumerate(sizes)}


def inputs(k: int = 576, rows: int = 1200, outliers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to learn from and rows to judge by, of related channels, some of which may be large."""
    x = torch.randn(rows, k // 4) @ torch.randn(k // 4, k) / (k // 4) ** 0.5 + 0.5 * torch.randn(rows, k)
    if outliers:
        x[:, ::67] *= 30
    return x[: rows * 3 // 4].bfloat16(), x[rows * 3 // 4 :].bfloat16()


def recipe_for(method: str, **more) -> Recipe:
    return Recipe(method, "mxfp8" if method == "mxfp8" else "mxfp4", **more)


@torch.no_grad()
def error_of(layer: mxdit.MXLinear, linear: nn.Linear, x: torch.Tensor) -> float:
    """||y_q - y||^2 / ||y||^2, y in float64."""
    exact = nn.functional.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())  # fmt: skip
    return float((layer(x).double() - exact).square().sum() / exact.square().sum())


def layer_of(result: Calibrated, linear: nn.Linear, recipe: Recipe) -> mxdit.MXLinear:
    n, k = linear.weight.shape
    bias = linear.bias if result.bias is None else result.bias
    layer = mxdit.MXLinear(
        k, n, bias is not None, method=recipe.method, activation=recipe.activation, rule=recipe.rule,
        smooth="mul_scale" in result.parts, dtype=torch.bfloat16,
    )  # fmt: skip
    layer.load_state_dict(result.parts if bias is None else {**result.parts, "bias": bias})
    return layer


def same(a: dict[str, Calibrated], b: dict[str, Calibrated]) -> bool:
    return all(
        a[path].parts.keys() == b[path].parts.keys()
        and all(torch.equal(part, b[path].parts[name]) for name, part in a[path].parts.items())
        for path in a
    )


# -- what is reported ------------------------------------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("sizes, bias", (((24, 24, 16), True), ((40,), False)), ids=("qkv", "alone"))
def test_the_reported_error_is_what_the_layer_has(method, activation, rule, sizes, bias):
    of, (fit, held), recipe = group(sizes=sizes, bias=bias), inputs(outliers=True), Recipe(method, activation, rule)
    found = calibrate(of, fit, held, recipe)
    assert list(found) == list(of)
    for path, result in found.items():
        linear = of[path]
        assert result.error == pytest.approx(error_of(layer_of(result, linear, recipe), linear, held), rel=1e-4)
        online = mxdit.MXLinear.from_weight(linear.weight, linear.bias, method=method, activation=activation, rule=rule)
        assert result.online == pytest.approx(error_of(online, linear, held), rel=1e-4)
        assert result.error < result.online
        record = block_format(method).tensors(*linear.weight.shape, smooth="mul_scale" in result.parts)
        assert list(record) == list(result.parts)


@recipes
def test_every_trial_that_stayed_lowered_the_error(method, activation, rule):
    found = calibrate(group(sizes=(24,)), *inputs(outliers=True), Recipe(method, activation, rule, STEPS))
    for result in found.values():
        best = result.trials[0].error
        assert result.trials[0].step == "online" and result.trials[0].kept
        for trial in result.trials[1:]:
            assert trial.kept == (trial.error < best), trial.step
            best = min(best, trial.error)
        assert result.error == best


@pytest.mark.parametrize(
    ("method", "step"),
    [
        (method, step)
        for method in METHODS
        for step in ("search", "gptq", "refit")
        if recipe_for(method, steps=(step,)).does(step)
    ],
)
def test_a_step_that_makes_it_worse_leaves_everything_as_it_was(monkeypatch, method, step):
    recipe = recipe_for(method, steps=("smooth", "search", "gptq", "refit"))
    before = tuple(name for name in recipe.steps[: recipe.steps.index(step)])
    of, rows = group(sizes=(24, 16)), inputs(outliers=True)
    want = calibrate(of, *rows, recipe_for(method, steps=before))

    def spoiled(weight: torch.Tensor, *_: object) -> mxdit.Packed:
        return search(-torch.cat([linear.weight.detach().float() for linear in of.values()]), torch.ones(576), method)

    monkeypatch.setattr(module.scales if step != "gptq" else module, step, spoiled)
    found = calibrate(of, *rows, recipe_for(method, steps=(*before, step)))
    assert same(found, want)
    for path, result in found.items():
        assert result.error == want[path].error and result.trials[:-1] == want[path].trials
        assert result.trials[-1].step == step and not result.trials[-1].kept and result.trials[-1].error > 1


@methods
def test_the_same_inputs_give_the_same_bytes(method):
    of, rows = group(), inputs(outliers=True)
    first, second = (calibrate(of, *rows, recipe_for(method, steps=STEPS)) for _ in range(2))
    assert same(first, second) and all(first[path].trials == second[path].trials for path in of)


# -- steps -----------------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("left_out", (None, *STEPS))
def test_each_step_can_be_left_out(method, left_out):
    recipe = recipe_for(method, steps=tuple(step for step in STEPS if step != left_out))
    (result,) = calibrate(group(96, (8,)), *inputs(96, 300), recipe).values()
    wanted = [step for step in STEPS if recipe.does(step)]
    if "regress" in wanted:
        wanted = [step for step in wanted if step != "gptq"]  # which is then part of it
    assert {trial.step for trial in result.trials} == {"online", *wanted}
    assert len(result.trials) == 1 + len(wanted)


@methods
@pytest.mark.parametrize("step", STEPS)
def test_each_step_can_be_alone(method, step):
    recipe = recipe_for(method, steps=(step,))
    (result,) = calibrate(group(96, (8,)), *inputs(96, 300), recipe).values()
    assert [trial.step for trial in result.trials] == ["online", *([step] if recipe.does(step) else [])]


def test_formats_without_smoothing_or_outer_scales_leave_these_steps_out():
    assert not recipe_for("mxfp8").does("smooth") and not recipe_for("mxfp8").does("refit")
    assert recipe_for("mxfp4").does("smooth") and not recipe_for("mxfp4").does("refit")
    assert all(recipe_for("mxfp4_dualscale").does(step) == (step in DEFAULT) for step in STEPS)


def test_recipes_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="no such step; got polish"):
        recipe_for("mxfp4", steps=("gptq", "polish"))
    with pytest.raises(FormatError, match="no scheme multiplies"):
        Recipe("mxfp8", "mxfp4")


@pytest.mark.parametrize("method", ("mxfp4", "mxfp4_dualscale"))
def test_members_share_their_factors_or_have_none(method):
    of = group()
    for outliers in (True, False):
        found = calibrate(of, *inputs(outliers=outliers), recipe_for(method))
        factors = [result.parts.get("mul_scale") for result in found.values()]
        kept = {trial.kept for result in found.values() for trial in result.trials if trial.step == "smooth"}
        assert len(kept) == 1 and all((m is not None) == kept.copy().pop() for m in factors)
        assert all(m is None or torch.equal(m, factors[0]) for m in factors)


@pytest.mark.parametrize(
    "method, activation", [pair[:2] for pair in PAIRS if pair[0] != "mxfp8" and pair[1] == "mxfp4"]
)
def test_inputs_with_outliers_gain_by_smoothing(method, activation):
    of, rows = group(), inputs(outliers=True)
    smooth, plain = (calibrate(of, *rows, Recipe(method, activation, steps=steps)) for steps in (DEFAULT, DEFAULT[1:]))
    for path in of:
        (trial,) = (trial for trial in smooth[path].trials if trial.step == "smooth")
        assert trial.kept and trial.error < smooth[path].online and trial.note != "none"
        assert smooth[path].error < 0.8 * plain[path].error


def test_factors_that_make_it_worse_are_not_kept_by_any_member(monkeypatch):
    of, rows = group(sizes=(24, 16)), inputs(outliers=True)
    factors = torch.where(torch.arange(576) % 67 == 0, 64.0, 1.0)  # outliers larger still
    monkeypatch.setattr(module.smooth, "best", lambda *_: (module.smooth.Smoothing("spoiled", factors), {}))
    found = calibrate(of, *rows, recipe_for("mxfp4"))
    for result in found.values():
        (trial,) = (trial for trial in result.trials if trial.step == "smooth")
        assert not trial.kept and trial.error > result.online and trial.note == "spoiled"
    assert same(found, calibrate(of, *rows, recipe_for("mxfp4", steps=DEFAULT[1:])))


@recipes
@pytest.mark.parametrize("smooth", (True, False))
def test_the_hessian_is_of_inputs_as_the_layer_multiplies_them(monkeypatch, method, activation, rule, smooth):
    seen = []
    real = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda h, damping: seen.append(h.clone()) or real(h, damping))
    fit, held = inputs(outliers=True)
    steps = ("smooth", "gptq") if smooth else ("gptq",)
    (result,) = calibrate(group(sizes=(24,)), fit, held, Recipe(method, activation, rule, steps)).values()
    smoothed = next((trial.kept for trial in result.trials if trial.step == "smooth"), False)
    m = result.parts["mul_scale"] if smoothed else None
    fmt = {"mxfp4": method, "mxfp8": "mxfp8", "bf16": None}[activation]
    x = fit if m is None else fit * m.bfloat16()
    if fmt is not None:
        x = mxdit.decode(mxdit.encode(x, fmt, rule if fmt == "mxfp4" else None))
    want = x.double().mT @ x.double() / len(fit)
    assert float((seen[0].double() - want).abs().max()) <= 2.0**-16 * float(want.abs().max())


def test_a_regression_makes_up_for_rounded_activations():
    of, (fit, _) = group(sizes=(24,)), inputs()
    plain, regressed = (
        calibrate(of, fit, fit, recipe_for("mxfp4", steps=steps))["to_0"] for steps in (DEFAULT, (*DEFAULT, "regress"))
    )  # judged by what it learned from: a least-squares solution can only gain
    assert regressed.trials[-1].step == "regress" and regressed.trials[-1].kept
    assert regressed.error < 0.9 * plain.error


def test_outer_scales_are_refitted_to_the_weight_that_was_rounded(monkeypatch):
    seen = {}
    for of, name in ((module, "gptq"), (module.scales, "refit")):
        real, at = getattr(of, name), 0 if of is module else 1
        monkeypatch.setattr(
            of, name, lambda *args, real=real, name=name, at=at: seen.update({name: args[at]}) or real(*args)
        )
    linears = group(96, (8,))
    for steps, changed in ((DEFAULT[1:], False), ((*DEFAULT[1:], "regress"), True)):
        calibrate(linears, *inputs(96, 300), recipe_for("mxfp4_dualscale", steps=steps))
        assert seen["refit"] is seen["gptq"]
        assert torch.equal(seen["refit"], linears["to_0"].weight.float()) != changed


def test_a_bias_takes_up_the_mean_error():
    fit, held = ((x + torch.arange(576) % 7 / 4).bfloat16() for x in inputs())  # what has a mean has a mean error
    for bias in (True, False):
        of = group(sizes=(24,), bias=bias)
        recipe = recipe_for("mxfp4", steps=("gptq", "bias"))
        result = calibrate(of, fit, held, recipe)["to_0"]
        assert result.trials[-1].step == "bias" and result.trials[-1].kept
        assert result.bias.dtype is torch.bfloat16 and result.bias.shape == (24,)
        assert result.error == pytest.approx(error_of(layer_of(result, of["to_0"], recipe), of["to_0"], held), rel=1e-4)


def test_more_damping_than_asked_for_is_noted(monkeypatch):
    real = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda h, damping: (real(h, damping)[0], 10 * damping))
    (result,) = calibrate(group(96, (8,)), *inputs(96, 300), recipe_for("mxfp4")).values()
    assert [trial.note for trial in result.trials if trial.step == "gptq"] == ["damping 0.1"]


# -- inputs --------------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("where", (0, 1), ids=("fit", "held"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("steps", (DEFAULT, ("search",)), ids=("default", "search"))
def test_inputs_that_are_no_numbers_are_refused(method, where, bad, steps):
    rows = inputs(96, 300)
    rows[where][3, 5] = bad
    with pytest.raises(InputError, match="to_0: the inputs of a layer hold infs or NaNs"):
        calibrate(group(96, (8,)), *rows, recipe_for(method, steps=steps))


@methods
def test_channels_that_inputs_never_reach_do_no_harm(method):
    of, (fit, held) = group(), inputs(outliers=True)
    fit[:, 64:128], fit[:, 200] = 0, 0  # a whole block and more of it
    used = held.clone()
    used[:, 64:128], used[:, 200] = 0, 0
    found = calibrate(of, fit, used, recipe_for(method, steps=STEPS))
    for path, result in found.items():
        assert 0 < result.error < result.online
        m = result.parts.get("mul_scale", torch.ones(576))
        assert bool((m[64:128] == 1).all()) and m[200] == 1
        given = mxdit.decode(layer_of(result, of[path], recipe_for(method)).packed())[:, 64:128]
        exact = of[path].weight.detach().float()[:, 64:128]  # nothing is known of these, and still they are there
        assert float((given - exact).square().sum() / exact.square().sum()) < 0.03


@methods
def test_few_rows_and_no_input_at_all_work(method):
    for fit, held in (inputs(96, 8), (torch.zeros(4, 96).bfloat16(), torch.zeros(2, 96).bfloat16())):
        (result,) = calibrate(group(96, (8,), bias=False), fit, held, recipe_for(method, steps=STEPS)).values()
        assert result.error <= result.online and result.rows == len(fit) / 96
    assert result.error == 0


def test_a_step_that_falls_away_says_why():
    few, many = inputs(96, 40), inputs(96, 4000)
    recipe = recipe_for("mxfp4", steps=("smooth", "gptq"))
    found = {str(i): calibrate({"a": nn.Linear(96, 8)}, *rows, recipe)["a"] for i, rows in enumerate((few, many))}
    assert {key: result.rows for key, result in found.items()} == {"0": 30 / 96, "1": 3000 / 96}
    for result in found.values():  # as if both had lost what only one may lose
        result.trials = [replace(trial, kept=trial.step in ("online", "smooth")) for trial in result.trials]
    said = {row["step"]: row["why_not"] for row in summary(found)}
    assert said["online"] == said["smooth"] == ""
    assert said["gptq"] == (
        "2 no better on held-out inputs, 1 of them with fewer than 2 rows a channel to learn from: give more prompts"
    )
    assert [row["why_not"] for row in summary({"1": found["1"]})][-1] == "1 no better on held-out inputs"


@methods
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_models_in_other_dtypes_are_calibrated(method, dtype):
    of, rows = {"a": nn.Linear(96, 8).to(dtype)}, [x.to(dtype) for x in inputs(96, 600)]
    recipe = recipe_for(method)
    (result,) = calibrate(of, *rows, recipe).values()
    layer = layer_of(result, of["a"], recipe)
    layer.bias = of["a"].bias
    assert result.error == pytest.approx(error_of(layer, of["a"], rows[1]), rel=1e-4) and result.error < result.online
