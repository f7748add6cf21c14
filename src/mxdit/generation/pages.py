"""Letting go of the pages of mapped weights: on a CPU a tensor that is read from a file as it is costs no memory until it is
used, and none again once its pages are given back. What is read after that comes from the file."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

MAPS = Path("/proc/self/smaps")
DONTNEED = 4  # MADV_DONTNEED of Linux: of a mapped file, the next access reads the file again


def release(module: nn.Module) -> int:
    """Give back the pages of a module's tensors that lie in mapped files, and return their bytes; other tensors stay.

    A mapping with a page that was written to, whose new content no file has, is left alone. 0 where the system does not say
    what is mapped.
    """
    if not MAPS.is_file():
        return 0
    page, mapped, released = mmap.PAGESIZE, list(_clean()), 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "cpu":
            continue
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start, stop = -(-start // page) * page, stop // page * page  # pages that hold nothing of a neighbour
        if start < stop and any(low <= start and stop <= high for low, high in mapped):
            if madvise(start, stop - start, DONTNEED):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            released += stop - start
    return released


def _clean() -> Iterator[tuple[int, int]]:
    """Addresses of the mapped files of which this process has changed no page."""
    found: tuple[int, int] | None = None
    for line in MAPS.read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):  # "start-stop perms offset dev inode path", of an anonymous mapping inode 0
            low, _, high = key.partition("-")
            found = (int(low, 16), int(high, 16)) if len(rest) >= 4 and rest[3] != "0" else None
        elif key == "Anonymous:" and found and rest[0] == "0":
            yield found
