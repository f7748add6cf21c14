"""`vllm-omni serve` in a process of its own, for as long as a `with` block lasts."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import engine


@contextmanager
def serving(model: Path, folder: Path, *arguments: str) -> Iterator[str]:
    """A server of a directory: its address, without a slash at the end.

    Args:
        folder: an empty one, for the log and the videos that the server keeps.
        arguments: of `vllm-omni serve`, beside the directory, ``--omni`` and the port.

    Raises EngineFailed with what the server printed, where it ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("vllm-omni")
    command = [program, "serve", model, "--omni", "--host", "127.0.0.1", "--port", port, "--enforce-eager", *arguments]
    log, address = folder / "log.txt", f"http://127.0.0.1:{port}"
    process = engine.start(command, log, {"VLLM_OMNI_SERVER_STORAGE__PATH": str(folder / "videos")})
    try:
        deadline = time.monotonic() + engine.TIMEOUT
        while not _healthy(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise engine.EngineFailed(f"no server, exit code {process.poll()}\n{log.read_text()}")
            time.sleep(0.5)
        yield address
    finally:
        engine.stop(process)


def _healthy(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, ConnectionError, TimeoutError):
        return False
