"""Which float type carries what is not quantized at the speed of this CPU."""

from __future__ import annotations

import time
from functools import cache

import torch

from mxdit.backends.environment import one_thread

SLOW = 1.5  # times as long as FP32: with instructions for it BF16 takes half as long, and emulated 3 to 40 times
_SIZE = 256  # of the square product that is timed: 1 ms, and 10 to 30 where it is emulated
_CALLS = 8  # of which the fastest counts; the first one compiles


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in FP32 a linear of torch's takes on this CPU in ``dtype``; below 1 is faster.

    It is measured, once a process, in up to 0.3 s. What the CPU has does not tell: torch and the libraries below it also go
    by their version and by variables such as ``ONEDNN_MAX_CPU_ISA``.

    Args:
        dtype: bf16 or fp16; FP32 is 1.
    """
    return _seconds(dtype) / _seconds(torch.float32)


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether torch multiplies in ``dtype`` clearly slower than in FP32 on this CPU, as it does where that is emulated: BF16 on
    a CPU with AVX2 only, or with AVX-512 without BF16 dot products."""
    return dtype is not torch.float32 and slowdown(dtype) > SLOW


def slow_bfloat16(device: str) -> bool:
    """Whether ``device`` ("cpu", "cuda:1", "npu", ...) is a CPU and FP32 is the faster type on it."""
    return torch.device(device).type == "cpu" and slow_on_cpu(torch.bfloat16)


def note(dtype: torch.dtype, device: str) -> str | None:
    """One sentence for a user who is about to compute in ``dtype`` what is not quantized, where FP32 is faster; else None."""
    if torch.device(device).type != "cpu" or not slow_on_cpu(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"torch emulates {name} on this CPU: a product takes {slowdown(dtype):.0f} times as long as in float32"


@torch.inference_mode()
def _seconds(dtype: torch.dtype) -> float:
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)
    taken = []
    with one_thread():  # or a busy neighbour would keep the other threads, and the answer, waiting
        for _ in range(_CALLS):
            started = time.perf_counter()
            torch.nn.functional.linear(x, x)
            taken.append(time.perf_counter() - started)
    return min(taken)
