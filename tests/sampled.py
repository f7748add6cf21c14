"""Memory that is taken and given back, in a module of its own: the process that measures it imports nothing else."""

from __future__ import annotations

import threading
import time
from unittest import mock

import torch

from mxdit.backends import cpu, native
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


def kept_of_attention(keys: int, width: int, method: str) -> dict[str, int]:
    """Path of the CPU's kernels -> bytes that they keep after one head's attention to so many keys.

    Each path attends in a thread of its own, whose buffers are new, and which lives until all are measured.
    """
    q, k = (torch.zeros(1, tokens, 1, width, dtype=torch.bfloat16) for tokens in (1, keys))
    kept, over = dict[str, int](), threading.Event()

    def attend(path: str, done: threading.Event) -> None:
        before = status("VmData")
        torch.ops.mxdit.attention(q, k, k, None, 1.0, False, method)
        kept[path] = status("VmData") - before
        done.set()
        over.wait()

    with mock.patch.object(cpu, "usable_threads", lambda: 1):
        for path in native.paths():
            with native.using(path):
                done = threading.Event()
                threading.Thread(target=attend, args=(path, done), daemon=True).start()
                assert done.wait(60)
    over.set()
    return kept
