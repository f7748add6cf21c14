"""What is bought with a budget: the linears that run in BF16, and those that have MXFP8 activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxdit.calibrate.budget import Curve, Option, curve
from mxdit.calibrate.experts import Group
from mxdit.calibrate.settings import Budget
from mxdit.errors import InputError

BF16 = "bf16"  # of the weight too: the linear is not quantized, and leaves no error


@dataclass(frozen=True)
class Spent:
    """A choice for each group of linears.

    Attributes:
        kept: expert -> linears that stay in BF16.
        raised: expert -> linears whose activations are MXFP8 at every step.
        predicted: the error that is left, as a share of the error with nothing bought.
        curve: (budget, least error, as such a share) from nothing bought to everything; empty where nothing is for sale.
        unit: what the curve's budgets are: "parameters", the share of them in BF16; "bytes" of all weights of the blocks; or
            "time" of their linears, as a multiple of what it was.
    """

    kept: dict[str, list[str]]
    raised: dict[str, list[str]]
    predicted: float = 1.0
    curve: Sequence[tuple[float, float]] = ()
    unit: str = "parameters"


def spend(
    budget: Budget, groups: Sequence[Group], errors: Sequence[Mapping[str, float]], activation: str, rows: Sequence[int]
) -> Spent:
    """Choose what leaves the least error.

    Args:
        budget: what may be spent.
        groups: of linears that share an input, of all transformers.
        errors: for each group, format of the activations over its quantized weights -> the error that it leaves.
        activation: that they have if nothing is bought, a key of `errors`.
        rows: for each group, rows of input that it multiplies in a clip.

    Raises InputError for a budget below what nothing bought takes, and for an error that nothing reaches.
    """
    times, base = budget.times, budget.times[activation]
    if budget.max_cost is not None:
        unit = "time"
        products = [count * group.parameters for count, group in zip(rows, groups, strict=True)]
        start = scale = base * sum(products)
        ways = [{name: times[name] - base for name in (*found, BF16)} for found in errors]
        costs = [
            {name: max(0, round(time * product)) for name, time in of.items()}
            for of, product in zip(ways, products, strict=True)
        ]
        room = round((budget.max_cost - 1) * start)
    elif budget.max_bytes is not None:
        unit, scale, start = "bytes", 1, sum(group.nbytes for group in groups)
        costs = [{activation: 0, BF16: 2 * group.parameters - group.nbytes} for group in groups]
        room = budget.max_bytes - start
        if room < 0:
            raise InputError(
                "fewer bytes than the quantized weights take",
                field="max_bytes",
                got=budget.max_bytes,
                expected=f"at least {start}",
            )
    else:
        unit, scale, start = "parameters", sum(group.parameters for group in groups), 0
        costs = [{activation: 0, BF16: group.parameters} for group in groups]
        room = int(budget.share * scale)
    found = curve(
        [
            [Option(name, 0.0 if name == BF16 else of[name], cost) for name, cost in priced.items()]
            for of, priced in zip(errors, costs, strict=True)
        ]
    )
    whole = sum(of[activation] for of in errors) or 1.0
    if budget.target is not None:
        room = found.least_budget(budget.target * whole)
    chosen = found.choice(room)
    kept: dict[str, list[str]] = {group.expert: [] for group in groups}
    raised: dict[str, list[str]] = {group.expert: [] for group in groups}
    for group, option in zip(groups, chosen, strict=True):
        if option.name == BF16:
            kept[group.expert] += group.paths
        elif option.name != activation:
            raised[group.expert] += group.paths
    left = sum(option.error for option in chosen)
    points = [((start + cost) / scale, error / whole) for cost, error in _points(found)]
    return Spent(kept, raised, left / whole, points, unit)


def _points(found: Curve) -> list[tuple[int, float]]:
    """(cost, error) at every percent of the curve."""
    ends = [round(percent / 100 * (found.errors.size - 1)) for percent in range(101)]
    return [(index * found.unit, float(found.errors[index])) for index in ends]
