"""`one_thread`: small tensors are not worth threads that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside. Where other processes take the cores, threads that wait for each other over tensors of
    a small clip make it 20 times slower (the judge's fit: 108 s for 4 s)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
