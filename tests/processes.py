"""Running a function in a process of its own, to be killed, limited, or watched: forked, so that it starts at once. And
Python from the start, as a user's program runs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 60  # seconds; what takes longer hangs


def start(output: Path, function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start `function(*args)`, with what it prints going to `output`."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(output, function, args), daemon=True)
    process.start()
    return process


def code_of(process: BaseProcess) -> int | None:
    """Wait for it: its exit code, minus the signal that killed it, or None where it hung and was killed for that."""
    process.join(TIMEOUT)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def run(output: Path, function: Callable[..., Any], *args: Any) -> tuple[int | None, str]:
    """`function(*args)` to its end: its exit code and what it printed."""
    return code_of(start(output, function, *args)), output.read_text()


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end: its exit code and what it printed. Warnings of libraries are left out."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=5 * TIMEOUT
    )


def output_of(*arguments: object, **environment: str) -> str:
    """What `python ARGUMENTS` prints, where it ends well."""
    done = python(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def limit_memory(extra: int) -> None:
    """Let this process take no more than `extra` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_file_size(size: int) -> None:
    """Let no file that this process writes grow beyond `size` bytes: a write fails then, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # Python ignores SIGXFSZ


def _run(output: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with output.open("w") as file:
        sys.stdout = sys.stderr = file
        function(*args)
