"""Measuring in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from mxdit.errors import BackendError

_T = TypeVar("_T")

# glibc keeps freed blocks of up to 32 MB for later, or not, as they happen to lie. Where memory is measured, tensors shall go
# back when they are freed; it costs time.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def alone(function: Callable[..., _T], *args: Any, environment: Mapping[str, str] | None = None) -> _T:
    """``function(*args)`` in a fresh process, where nothing else has taken memory. Both must be importable there.

    Args:
        environment: variables that it sees beside this process's own, such as `TIDY`.

    Raises what the function raises, and BackendError for a process that was killed.
    """
    with _environment(environment or {}), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise BackendError(
                "the process that measured was killed", where="bench", hint="Most likely memory ran out: measure less."
            ) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
