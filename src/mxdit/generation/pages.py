"""Letting go of the pages of mapped weights: on a CPU a tensor that is read from a file as it is costs no memory until it is
used, and none again once its pages are given back. What is read after that comes from the file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

from torch import nn

MAPS = Path("/proc/self/smaps")
DONTNEED = 4  # MADV_DONTNEED of Linux: of a mapped file, the next access reads the file again


def release(module: nn.Module) -> int:
    """Give back all pages of the mapped files that a module's tensors lie in, and return their bytes; other tensors stay.

    These are also the pages that tensors were cast or quantized from while they loaded: a file's mapping lasts for as long as
    one tensor lies in it. A mapping with a page that was written to, whose new content no file has, is left alone, and so is
    one that is locked. 0 where the system does not say what is mapped.
    """
    if not MAPS.is_file():
        return 0
    released, tensors = 0, (*module.parameters(), *module.buffers())
    starts = [tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu"]
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for low, high in _clean():
        if any(low <= start < high for start in starts) and not madvise(low, high - low, DONTNEED):
            released += high - low
    return released


def _clean() -> Iterator[tuple[int, int]]:
    """Addresses of the mapped files of which this process has changed no page."""
    found: tuple[int, int] | None = None
    changed = False
    for line in MAPS.read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # "start-stop perms offset dev inode path", of an anonymous mapping inode 0
            low, _, high = key.partition("-")
            found = (int(low, 16), int(high, 16)) if len(rest) >= 4 and rest[3] != "0" else None
        elif key == "Anonymous:":
            changed = rest[0] != "0"
        elif key == "Swap:" and found and not changed and rest[0] == "0":  # a changed page may have been swapped out
            yield found
