"""What a device reaches at its best, in the same run as what is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from mxdit.bench.modes import FP32
from mxdit.bench.timing import Call, alternate, last_cache, timer


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at its best in the same run.

    Attributes:
        copy: bytes a second, read and written, of a copy from memory to memory.
        bf16, fp32: operations a second of a square matrix product of torch's.
        size: of that product's sides.
    """

    copy: float
    bf16: float
    fp32: float
    size: int

    def peak(self, baseline: str) -> float:
        """Operations a second in that type, "bf16" or "fp32"."""
        return self.fp32 if baseline == FP32 else self.bf16


@torch.inference_mode()
def ceilings(device: torch.device, rounds: int, baseline: str) -> Ceilings:
    """Measure them, by the minimum: it is what the machine can do that is asked for.

    Args:
        baseline: "bf16", or "fp32" where BF16 is emulated: then the products are small, since one of 2048 takes seconds.
    """
    size, nbytes = (512 if baseline == FP32 else 2048, 4 * last_cache()) if device.type == "cpu" else (8192, 1 << 30)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    halves = left.bfloat16(), right.bfloat16()
    kinds: list[list[Call]] = [
        [partial(torch.empty_like(source).copy_, source)],
        [partial(F.linear, *halves)],
        [partial(F.linear, left, right)],
    ]
    copied, half, full = (min(seconds) for seconds in alternate(kinds, rounds, timer(device)))
    return Ceilings(2 * nbytes / copied, 2 * size**3 / half, 2 * size**3 / full, size)


@torch.inference_mode()
def linear_peak(linear: nn.Linear, rows: int, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of a linear over that many rows, quantizing them included, by the minimum."""
    x = torch.randn(rows, linear.in_features, device=device, dtype=dtype)
    taken = min(alternate([[partial(linear, x)]], rounds, timer(device))[0])
    return 2 * rows * linear.in_features * linear.out_features / taken
