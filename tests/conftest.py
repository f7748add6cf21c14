"""Shared settings: the same random numbers in every run, and hypothesis without clocks or a database."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("mxdit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("mxdit")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(20260101)
