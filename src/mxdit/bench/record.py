"""Where a benchmark was run, and all of it as JSON."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mxdit.backends.environment import environment
from mxdit.bench.timing import caches

SCHEMA = 1  # of the JSON; a change that readers notice is a new number


def report(
    benchmark: str, device: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """A run, JSON-serializable: bytes and seconds throughout; ``more`` are further keys."""
    machine = {
        **environment(device),
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "load": round(os.getloadavg()[0], 2),
    }
    return {"schema": SCHEMA, "benchmark": benchmark, "environment": machine, "settings": dict(settings), **more} | {
        "rows": list(rows)
    }
