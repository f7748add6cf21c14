"""Memory that is taken and given back, in a module of its own: the process that measures it imports nothing else."""

from __future__ import annotations

import time

import torch

from mxdit.generation.memory import Sampler, status


def taken() -> tuple[int, int]:
    """RssAnon and RSS over what was there before, of 64 MiB that were taken and given back."""
    before = status("RssAnon")
    with Sampler() as sampler:
        held, deadline = torch.ones(64 << 20, dtype=torch.uint8), time.monotonic() + 20
        while sampler.anon - before <= 60 << 20 and time.monotonic() < deadline:
            time.sleep(0.001)  # on a busy machine its thread comes late
        del held
    return sampler.anon - before, sampler.rss - before
