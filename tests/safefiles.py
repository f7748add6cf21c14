"""Safetensors files by hand, any header over any data; and all that a tensor or a directory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a file: `header` as JSON, or as it is, after its length or another."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def bits(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    """All of a tensor, NaNs included."""
    data = tensor.contiguous().view(-1)
    return tuple(tensor.shape), tensor.dtype, bytes(data.view(torch.uint8).tolist()) if data.numel() else b""


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path inside."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
