"""The results of a run: totals, and all of it as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mxdit.conformance.case import FAIL, PASS, REFUSED, SKIPPED, Result

SCHEMA = 1  # of the JSON; a change that readers notice is a new number


def totals(results: Sequence[Result]) -> dict[str, int]:
    """How many results there are of each verdict, and how many codes and outputs were compared."""
    counts = Counter(result.verdict for result in results)
    verdicts = {verdict: counts[verdict] for verdict in (PASS, FAIL, REFUSED, SKIPPED)}
    return {"items": len(results), **verdicts, "elements": sum(result.elements for result in results)}


def report(where: dict[str, Any], results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """All of a run, JSON-serializable; ``where`` is its `environment`."""
    return {
        "schema": SCHEMA,
        "environment": where,
        "items": [result.to_dict() for result in results],
        "totals": totals(results),
        "seconds": seconds,
    }
