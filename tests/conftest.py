"""Shared settings: the same random numbers in every run, and hypothesis without clocks or a database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from mxdit.backends import cpu

settings.register_profile("mxdit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("mxdit")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(20260101)


@pytest.fixture(scope="module", params=[*cpu.paths(), cpu.REFERENCE])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that can answer on this CPU, one after the other."""
    with cpu.using(request.param):
        yield request.param
