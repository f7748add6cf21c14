"""What a budget buys, against all combinations of options."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxdit.calibrate import budget
from mxdit.calibrate.budget import Option, curve
from mxdit.errors import InputError

# Whole errors, so that sums in any order are equal.
items = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=2),
    ).map(
        lambda drawn: [
            Option("cheap", drawn[0], 0),
            *(Option(f"{i}", error, 3 * cost) for i, (error, cost) in enumerate(drawn[1])),
        ]
    ),
    min_size=1,
    max_size=5,
)


def least(of: list[list[Option]], room: float) -> float:
    """The least error of all combinations that cost no more."""
    return min(
        sum(option.error for option in chosen)
        for chosen in itertools.product(*of)
        if sum(option.cost for option in chosen) <= room
    )


@given(items, st.integers(0, 150))
def test_a_choice_is_the_best_of_all(of, room):
    found = curve(of)
    chosen = found.choice(room)
    assert all(option in item for option, item in zip(chosen, of, strict=True))
    assert sum(option.cost for option in chosen) <= room
    assert sum(option.error for option in chosen) == least(of, room)


@given(items)
def test_the_curve_is_the_least_error_of_every_budget(of):
    found = curve(of)
    assert found.unit % 3 == 0 or found.errors.size == 1
    assert found.errors.tolist() == [least(of, index * found.unit) for index in range(found.errors.size)]
    assert (np.diff(found.errors) <= 0).all() and found.errors[-1] == least(of, math.inf)


@given(items, st.integers(0, 150), st.integers(2, 12))
def test_costs_that_are_rounded_up_never_exceed_the_budget(of, room, units):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "UNITS", units)
        found = curve(of)
    most = sum(max(option.cost for option in item) for item in of)
    assert found.errors.size <= units + len(of) + 1 and found.unit >= most / units
    chosen = found.choice(room)
    error = sum(option.error for option in chosen)
    assert sum(option.cost for option in chosen) <= room
    assert least(of, room) <= error == found.errors[min(room // found.unit, found.errors.size - 1)]


@given(items, st.integers(0, 200))
def test_the_least_budget_is_the_smallest_that_reaches_an_error(of, error):
    found = curve(of)
    if error < least(of, math.inf):
        with pytest.raises(InputError, match="no choice reaches this error"):
            found.least_budget(error)
        return
    room = found.least_budget(error)
    assert least(of, room) <= error and (room == 0 or least(of, room - 1) > error)
    assert sum(option.error for option in found.choice(room)) <= error


def test_parameters_of_a_large_model_are_counted_coarsely_and_kept_to():
    sizes = [5120 * 5120 * 3 + 7, 5120 * 5120, 5120 * 13824 + 1, 5120 * 13824] * 40
    errors = np.random.default_rng(0).random(len(sizes))
    found = curve([[Option("four", e, 0), Option("bf16", 0.0, s)] for e, s in zip(errors, sizes, strict=True)])
    assert found.errors.size <= budget.UNITS + len(sizes) + 1
    for share in (0.0, 0.125, 0.5):
        room = int(share * sum(sizes))
        chosen = found.choice(room)
        spent, left = sum(option.cost for option in chosen), sum(option.error for option in chosen)
        assert room * 0.99 <= spent <= room
        by_gain = sorted(range(len(sizes)), key=lambda i: errors[i] / sizes[i])
        greedy, free = errors.sum(), room
        for i in reversed(by_gain):
            if sizes[i] <= free:
                free, greedy = free - sizes[i], greedy - errors[i]
        assert left <= greedy * (1 + 1e-3)


def test_a_budget_below_nothing_is_refused():
    with pytest.raises(InputError, match="below what four bits throughout take"):
        curve([[Option("four", 1.0, 0)]]).choice(-1)
