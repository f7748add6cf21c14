"""What can be known of models on a device before a server starts, found out in a process that ends and leaves no memory taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from mxdit.generation import compiling, loading
from mxdit.serve.served import Served


def check(served: Sequence[Served], devices: Sequence[str]) -> None:
    """Try what every job would need. Takes seconds.

    Raises InputError for a model of which no clip at all fits into its `memory`, and where nothing can be compiled; ModelError
    for one whose attention cannot be chosen, and ConfigError for layers of attention that it does not have.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(_check, served, devices).result()


def _check(served: Sequence[Served], devices: Sequence[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for one in served:
        session = one.open()
        loading.check_attention(session.model, session.attention)
    for device in devices:
        if any(one.compile for one in served):
            compiling.prepare(device)  # before memory is planned, because it takes some, as in a worker
        for one in served:
            one.open(device).check_memory()
