"""A server of tiny models for tests: inside this process, or as a process of its own that can be killed."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from mxdit.serve.access import Access
from mxdit.serve.adapters import Shelf
from mxdit.serve.app import make_app
from mxdit.serve.device import DeviceRunner
from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.files import Files
from mxdit.serve.jobs import Jobs
from mxdit.serve.served import Catalog, Served

SMALL = {"prompt": "a red seven", "size": "16x16", "num_frames": 5, "num_inference_steps": 4}
DEADLINE = 180.0  # seconds: a machine under load starts a process in 60
KEY = "0123456789abcdef"


def served(path: Path, task: str = "t2v", mode: str = "none") -> Served:
    return Served(f"tiny-{task}", mode, path, task, {}, {}, torch.float32)


def app_of(
    data: Path,
    models: list[Served],
    *,
    keys: tuple[str, ...] = (),
    most: int = 1 << 20,
    waiting: int = 1000,
    shelf: Shelf | None = None,
) -> FastAPI:
    """A server in this process, its worker in another."""
    catalog, table = Catalog(models, shelf), Jobs(data / "jobs.sqlite", most=waiting)
    app = make_app(catalog, table, Dispatcher(table, Files(data), [DeviceRunner(catalog, "cpu")]))
    app.add_middleware(Access, keys=keys, most=most, limit=60)
    return app


@contextmanager
def client(data: Path, models: list[Served], **options: Any) -> Iterator[TestClient]:
    """A client of such a server."""
    with TestClient(app_of(data, models, **options), raise_server_exceptions=False) as found:
        yield found


class Listener:
    """An application that answers on a port, from a thread of this process, until it is killed."""

    def __init__(self, app: Any, port: int) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started or not self._thread.is_alive())
        assert self._thread.is_alive()

    def stop(self) -> None:
        """End as a server does, and its workers with it."""
        self._server.should_exit = True
        self._thread.join(DEADLINE)

    def kill(self) -> None:
        """Open connections break."""
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(DEADLINE)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(client: Any, id: str, deadline: float = DEADLINE) -> dict[str, Any]:
    """The job, when it has ended."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        job = client.get(f"/v1/videos/{id}").json()
        if job["status"] in ("completed", "failed"):
            return job
        time.sleep(0.02)
    raise AssertionError(f"{id} did not end: {job}")


def png(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(file, kind)
    return file.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    """(height, width, 3) uint8 of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)))


def wait_for(condition: Any, deadline: float = DEADLINE) -> Any:
    """What `condition` gives once it is true."""
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come true")


class Process:
    """`mxdit serve` as users start it."""

    def __init__(self, data: Path, *models: Path, args: tuple[str, ...] = (), port: int = 0) -> None:
        self.data = data
        port = port or free_port()
        command = [
            sys.executable,
            "-m",
            "mxdit.cli",
            "serve",
            *map(str, models),
            "--data",
            str(data),
            "--port",
            str(port),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *(() if "--engine" in args else ("--dtype", "fp32")), *args],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.address, self.url = ("127.0.0.1", port), f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def ready(self, deadline: float = DEADLINE) -> Process:
        wait_for(lambda: self.process.poll() is not None or self._is_ready(), deadline)
        assert self.process.poll() is None, self.process.stderr.read()
        return self

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def workers(self) -> list[int]:
        """Process numbers of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        tasks = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")]
        pids = {int(pid) for pid in " ".join([children, *tasks]).split()}
        return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def memory(self) -> int:
        """Bytes of RSS of the process that answers."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def most_memory(self, *, from_now: bool = False) -> int:
        """The most bytes of RSS that it had, since it was asked for `from_now`."""
        if from_now:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))

    def descriptors(self) -> int:
        """How many it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def kill(self, how: int = signal.SIGKILL) -> int:
        self.process.send_signal(how)
        code = self.process.wait(DEADLINE)
        self.client.close()
        self.process.stderr.close()
        return code
