"""FP4 values, one in a float, and FP4 codes, two in a byte: the same numbers, exactly.

Some layouts (vLLM-Omni, MindIE-SD) store each E2M1 value as the E4M3 code of that value, the sign of zero included.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from mxdit.checkpoint.writer import Part
from mxdit.errors import CheckpointError
from mxdit.numerics.codec import element_values
from mxdit.numerics.formats import E2M1, TensorInfo

OFF_GRID = 0xFF
_CHUNK = 1 << 18  # elements at once: the lookup's indices are eight bytes each


def pack(values: Tensor, where: str) -> Tensor:
    """(N, K) FP4 values in any float dtype to (N, K/2) uint8 codes, element 2i in the low nibble.

    Raises CheckpointError, with the first value seen, where one is off the E2M1 grid.
    """
    n, k = values.shape
    out = torch.empty(n, k // 2, dtype=torch.uint8)
    step = max(1, _CHUNK // k)
    for start in range(0, n, step):
        part = values[start : start + step]
        eight = part if part.dtype is torch.float8_e4m3fn else part.to(torch.float8_e4m3fn)
        codes = torch.from_numpy(_from_e4m3()[eight.view(torch.uint8).numpy()])
        wrong = codes == OFF_GRID
        if eight is not part:
            wrong |= eight.to(part.dtype) != part
        if bool(wrong.any()):
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise CheckpointError(
                "a value that FP4 does not have",
                where=where,
                got=f"{float(part[row, column])} at ({start + row}, {column})",
                expected="0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives",
                hint="The file is damaged, or its weights are not FP4 values.",
            )
        out[start : start + step] = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return out


def unpack(codes: Tensor) -> Tensor:
    """(N, K/2) uint8 codes to (N, K) FP4 values as float8_e4m3fn."""
    n, half = codes.shape
    out = torch.empty(n, half * 2, dtype=torch.uint8)
    step = max(1, _CHUNK // (2 * half))
    for start in range(0, n, step):
        part = codes[start : start + step].numpy()
        out[start : start + step, 0::2] = torch.from_numpy(_to_e4m3()[part & 15])
        out[start : start + step, 1::2] = torch.from_numpy(_to_e4m3()[part >> 4])
    return out.view(torch.float8_e4m3fn)


def values_of(codes: Part) -> Part:
    """A weight's FP4 codes, two in a byte, as its values in float8_e4m3fn."""
    n, half = codes.info.shape
    return Part(TensorInfo((n, 2 * half), torch.float8_e4m3fn), partial(_unpacked, codes))


def as_e4m3(codes: Part) -> Part:
    """A weight's E4M3 codes in float8_e4m3fn instead of uint8: the same bytes."""
    return Part(TensorInfo(codes.info.shape, torch.float8_e4m3fn), partial(_viewed, codes))


def _unpacked(codes: Part) -> Tensor:
    return unpack(codes.read())


def _viewed(codes: Part) -> Tensor:
    return codes.read().view(torch.float8_e4m3fn)


@cache
def _to_e4m3() -> np.ndarray:
    """The E4M3 code of each of the 16 E2M1 codes."""
    return torch.tensor(element_values(E2M1)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@cache
def _from_e4m3() -> np.ndarray:
    """The E2M1 code of each of the 256 E4M3 codes, OFF_GRID where there is none."""
    table = np.full(256, OFF_GRID, dtype=np.uint8)
    table[_to_e4m3()] = np.arange(16)
    return table
