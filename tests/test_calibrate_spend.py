"""What budgets buy, against every combination of options, in parameters, bytes and time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdit.calibrate.experts import Group
from mxdit.calibrate.settings import Budget
from mxdit.calibrate.spend import Spent, spend
from mxdit.errors import InputError

FOUR, EIGHT, BF16 = "mxfp4", "mxfp8", "bf16"
TIMES = {FOUR: 1.0, EIGHT: 2.0, BF16: 4.0}


def groups(sizes: list[int]) -> list[Group]:
    """Of so many parameters, at 4.25 bits each, in two transformers."""
    return [
        Group("transformer_2" if i % 2 else "transformer", (f"{i}.q", f"{i}.k"), 320 * size, 170 * size)
        for i, size in enumerate(sizes)
    ]


drawn = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 40), st.integers(0, 40), st.sampled_from((1, 16))),
    min_size=1,
    max_size=5,
).filter(lambda rows: any(four for _, four, _, _ in rows))


def cheapest(of: list[list[tuple[float, float]]], room: float) -> float:
    """The least error of all combinations of (error, cost) that cost no more."""
    return min(
        sum(error for error, _ in chosen)
        for chosen in itertools.product(*of)
        if sum(cost for _, cost in chosen) <= room + 1e-9
    )


def error_of(spent: Spent, of: list[Group], errors: list[dict[str, float]]) -> float:
    """What is left, by the choice itself."""
    left = 0.0
    for group, found in zip(of, errors, strict=True):
        if group.paths[0] in spent.kept[group.expert]:
            assert group.paths[1] in spent.kept[group.expert]
        else:
            left += found[EIGHT if group.paths[0] in spent.raised[group.expert] else FOUR]
    return left


@given(drawn, st.floats(1, 4))
def test_a_budget_of_time_buys_bf16_and_eight_bit_activations(rows, most):
    of, errors = groups([size for size, *_ in rows]), [{FOUR: float(a), EIGHT: float(b)} for _, a, b, _ in rows]
    counts = [count for *_, count in rows]
    spent = spend(Budget(max_cost=most), of, errors, FOUR, counts)
    products = [group.parameters * count for group, count in zip(of, counts, strict=True)]
    choices = [
        [(found[FOUR], 0.0), (found[EIGHT], 1.0 * product), (0.0, 3.0 * product)]
        for found, product in zip(errors, products, strict=True)
    ]
    room = round((most - 1) * sum(products))
    left = error_of(spent, of, errors)
    assert left == cheapest(choices, room)
    assert spent.predicted == pytest.approx(left / sum(found[FOUR] for found in errors)) and spent.unit == "time"
    assert spent.curve[0] == (1.0, 1.0) and spent.curve[-1][0] == pytest.approx(4.0) and spent.curve[-1][1] == 0


@given(drawn, st.floats(0, 1))
def test_a_budget_of_parameters_and_the_same_in_bytes_buy_bf16_alone(rows, share):
    of, errors = groups([size for size, *_ in rows]), [{FOUR: float(a)} for _, a, _, _ in rows]
    whole, floor = sum(group.parameters for group in of), sum(group.nbytes for group in of)
    spent = spend(Budget(share), of, errors, FOUR, [1] * len(of))
    choices = [[(found[FOUR], 0), (0.0, group.parameters)] for found, group in zip(errors, of, strict=True)]
    assert error_of(spent, of, errors) == cheapest(choices, int(share * whole))
    assert not any(spent.raised.values()) and spent.curve[-1] == (1.0, 0.0)
    limit = floor + int(int(share * whole) * (2 - 170 / 320))
    bytes_ = spend(Budget(max_bytes=limit), of, errors, FOUR, [1] * len(of))
    assert error_of(bytes_, of, errors) == error_of(spent, of, errors)
    assert bytes_.curve[0][0] == floor and bytes_.curve[-1][0] == 2 * whole


@given(drawn, st.floats(0, 1))
def test_a_target_is_met_by_the_fewest_parameters(rows, target):
    of, errors = groups([size for size, *_ in rows]), [{FOUR: float(a)} for _, a, _, _ in rows]
    spent = spend(Budget(target=target), of, errors, FOUR, [1] * len(of))
    whole = sum(found[FOUR] for found in errors)
    assert error_of(spent, of, errors) <= target * whole
    used = sum(group.parameters for group in of if group.paths[0] in spent.kept[group.expert])
    choices = [[(found[FOUR], 0), (0.0, group.parameters)] for found, group in zip(errors, of, strict=True)]
    assert used == 0 or cheapest(choices, used - 1) > target * whole


def test_text_costs_by_its_rows():
    """As large a linear, on a sixteenth of the rows, is bought first."""
    errors = [{FOUR: 1.0}, {FOUR: 1.0}]
    spent = spend(Budget(max_cost=1.2), groups([4, 4]), errors, FOUR, [16, 1])
    assert spent.kept == {"transformer": [], "transformer_2": ["1.q", "1.k"]} and not any(spent.raised.values())


def test_a_format_that_takes_no_more_time_is_taken_for_nothing():
    times = {FOUR: 1.0, EIGHT: 1.0, BF16: 2.0}
    spent = spend(Budget(max_cost=1.0, times=times), groups([1]), [{FOUR: 1.0, EIGHT: 0.25}], FOUR, [1])
    assert spent.raised == {"transformer": ["0.q", "0.k"]} and spent.predicted == 0.25


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"max_cost": 0.5}, "no time that a budget could be"),
        ({"max_cost": float("nan")}, "no time that a budget could be"),
        ({"max_cost": 1.5, "target": 0.5}, "two budgets at once"),
        ({"max_bytes": 1, "max_cost": 1.5}, "two budgets at once"),
        ({"times": {FOUR: 1.0}}, "not the time of each format"),
        ({"times": {**TIMES, "fp8": 2.0}}, "not the time of each format"),
        ({"times": {**TIMES, BF16: 0.0}}, "not the time of each format"),
    ],
)
def test_budgets_that_say_nothing(asked: dict[str, Any], said):
    with pytest.raises(InputError, match=said):
        Budget(**asked)


def test_no_bytes_below_the_quantized_weights():
    with pytest.raises(InputError, match="fewer bytes than the quantized weights take") as raised:
        spend(Budget(max_bytes=100), groups([1, 1]), [{FOUR: 1.0}] * 2, FOUR, [1, 1])
    assert "at least 340" in str(raised.value)
