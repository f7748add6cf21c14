"""The shared library of the native CPU kernels (csrc/cpu), and which of its instruction set paths answers.

docs/cpu.md says which paths there are. The environment variable MXDIT_CPU_PATH forces one (or ``reference``).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path

from mxdit.errors import BackendError

VARIABLE = "MXDIT_CPU_PATH"
REFERENCE = "reference"
_NO_LIBRARY = (
    "mxdit was installed without its native library, which takes a C++20 compiler; install one, then mxdit again"
)

by_reference = False  # whether the reference answers although there is a library
refusal: BackendError | None = None  # what is wrong with the path that the environment names: raised by the first op


@cache
def library() -> ctypes.CDLL | None:
    """The shared library that was built with the package, or None where it was installed without one."""
    # In an editable install it lies elsewhere than this file.
    path = Path(str(files("mxdit.backends").joinpath("libmxdit_cpu.so")))
    if not path.is_file():
        return None
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            "the native library does not load",
            where=str(path),
            got=error,
            expected="a library built for this machine",
            hint="Install mxdit again on this machine.",
        ) from error
    kernels.mx_paths.restype = kernels.mx_selected.restype = ctypes.c_char_p
    kernels.mx_select.argtypes = [ctypes.c_char_p]
    nothing = (kernels.mx_encode, kernels.mx_decode, kernels.mx_rms_norm, kernels.mx_gelu)
    for function in nothing:
        function.restype = None
    for function in (*nothing, kernels.mx_linear, kernels.mx_attention):
        function.argtypes = [ctypes.c_char_p, ctypes.c_int]
    return kernels


def paths() -> tuple[str, ...]:
    """The instruction set paths that this CPU runs, best first; empty where there is no native library."""
    kernels = library()
    return () if kernels is None else tuple(kernels.mx_paths().decode().split())


def selected() -> str:
    """The path that answers now, or ``reference``."""
    kernels = library()
    return REFERENCE if kernels is None or by_reference else kernels.mx_selected().decode()


def select(path: str | None) -> None:
    """Let that path answer from now on, in the whole process: one of `paths`, ``reference``, or None for the best.

    Raises:
        BackendError: for a path that this CPU does not run.
    """
    global by_reference, refusal
    kernels = library()
    if path not in (None, REFERENCE, *paths()):
        raise BackendError(
            "no such instruction set path on this CPU",
            where=VARIABLE if os.environ.get(VARIABLE) == path else "mxdit.backends.native.select",
            got=repr(path),
            expected=" or ".join([*paths(), REFERENCE]),
            hint=None if kernels else f"Native kernels are missing: {_NO_LIBRARY}.",
        )
    by_reference, refusal = path == REFERENCE, None
    if kernels is not None and path != REFERENCE:
        kernels.mx_select(path.encode() if path else None)


@contextmanager
def using(path: str | None) -> Iterator[None]:
    """`select` for the length of a ``with`` block."""
    global refusal
    before, refused = selected(), refusal
    select(path)
    try:
        yield
    finally:
        select(before)
        refusal = refused


def choose() -> None:
    """`select` what the environment names. One that is not to be had is an error when an op is called, not before, so that
    a program can say it and `why_not` is there to ask."""
    global by_reference, refusal
    try:
        select(os.environ.get(VARIABLE) or None)
    except BackendError as error:
        by_reference, refusal = True, error


def why_not() -> str | None:
    """None where native kernels answer, else the reason in words."""
    if refusal is not None:
        return str(refusal)
    if library() is None:
        return _NO_LIBRARY
    return f"the reference was chosen ({VARIABLE})" if by_reference else None


def about() -> str:
    """The path in use and what else this CPU runs."""
    others = ", ".join(path for path in paths() if path != selected())
    return f"path {selected()}; this CPU also runs {others}" if others else f"path {selected()}"
