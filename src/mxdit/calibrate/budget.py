"""What a budget buys: which groups of linears run in more bits, so that the least error is left. An exact knapsack.

Errors of groups add up (docs/calibrating.md has how nearly), so the best choice under a budget is one of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mxdit.errors import InputError

UNITS = 100_000  # most steps that a budget is counted in; costs that need finer ones are rounded up


@dataclass(frozen=True)
class Option:
    """One way to run a group: the error that it leaves, and what it costs beside the cheapest."""

    name: str
    error: float
    cost: int


@dataclass(frozen=True)
class Curve:
    """The least error for every budget.

    Attributes:
        unit: what one step of `errors` costs.
        errors: of budgets 0, unit, 2 unit, ...; not increasing.
    """

    items: Sequence[Sequence[Option]]
    unit: int
    errors: np.ndarray
    _taken: np.ndarray  # (items, budgets): the option of each

    def choice(self, budget: int) -> list[Option]:
        """The option of each item under a budget. Raises InputError for a negative one."""
        if budget < 0:
            raise InputError("the budget is below what four bits throughout take", field="budget", got=budget)
        left, chosen = min(budget // self.unit, self.errors.size - 1), list[Option]()
        for item, taken in zip(reversed(self.items), reversed(self._taken), strict=True):
            option = item[taken[left]]
            chosen.append(option)
            left -= math.ceil(option.cost / self.unit)
        return chosen[::-1]

    def least_budget(self, error: float) -> int:
        """The smallest budget whose error is no more than `error`. Raises InputError where none is."""
        enough = np.flatnonzero(self.errors <= error)
        if not enough.size:
            raise InputError(
                "no choice reaches this error",
                field="target",
                got=f"{error:g}",
                expected=f"at least {self.errors[-1]:g}",
            )
        return int(enough[0]) * self.unit


def curve(items: Sequence[Sequence[Option]]) -> Curve:
    """Solve for all budgets at once, from nothing to the dearest option of every item.

    Args:
        items: the options of each; one of them must cost nothing.
    """
    costs = [option.cost for item in items for option in item if option.cost]
    most = sum(max(option.cost for option in item) for item in items)
    unit = math.gcd(*costs) if costs else 1
    if most // unit > UNITS:
        unit = math.ceil(most / UNITS)
    size = sum(max(math.ceil(option.cost / unit) for option in item) for item in items) + 1
    errors, taken = np.zeros(size), np.zeros((len(items), size), dtype=np.uint8)
    for row, item in enumerate(items):
        best = np.full(size, np.inf)
        for number, option in enumerate(item):
            cost = math.ceil(option.cost / unit)
            reached = np.full(size, np.inf)
            reached[cost:] = errors[: size - cost] + option.error
            better = reached < best
            best[better] = reached[better]
            taken[row, better] = number
        errors = best
    return Curve(items, unit, errors, taken)
