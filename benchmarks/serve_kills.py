"""How many jobs a server loses that is killed again and again: clients submit, servers and workers die, and all is counted.

    python benchmarks/serve_kills.py --jobs 200 --clients 20 --kills 20

Each client submits its share of jobs of the bundled model (3 steps, one of ten 9 frames long), again and again where nobody
answers, under an Idempotency-Key. Meanwhile the server, a worker or both get SIGKILL, at random moments once a worker is ready or
a job runs. At the end every accepted job has to have ended, every file to decode, and the runs that were done twice are counted:
attempts beyond the first.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import av

PATIENCE = 180.0  # seconds for a server and its worker to come up


class Server:
    """`mxdit serve`, started again where it ended."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [
            sys.executable,
            "-m",
            "mxdit.cli",
            "serve",
            "--method",
            "none",
            "--data",
            str(data),
            "--port",
            str(self.port),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)

    def workers(self) -> list[int]:
        found = []
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in path.read_text().split():
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """What it answers, as bytes; None where nobody does."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json", **headers}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read()
        except (OSError, urllib.error.URLError):
            return None

    def wait_until_ready(self) -> None:
        """Raises TimeoutError where it does not come up."""
        until = time.monotonic() + PATIENCE
        while self.ask("GET", "/ready") is None:
            if time.monotonic() > until:
                raise TimeoutError(f"no server within {PATIENCE:g} s")
            time.sleep(0.1)  # between two looks at another process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("jobs", 200), ("clients", 20), ("kills", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    chance, accepted, killed = random.Random(asked.seed), {}, Counter()
    with tempfile.TemporaryDirectory() as data:
        server = Server(Path(data))
        server.wait_until_ready()

        def submit(client: int) -> None:
            for number in range(client, asked.jobs, asked.clients):
                frames = 9 if number % 10 == 0 else 5
                body = {
                    "prompt": "a red seven moving left on a blue background",
                    "seed": number,
                    "num_frames": frames,
                    "num_inference_steps": 3,
                }
                while (answer := server.ask("POST", "/v1/videos", body, **{"Idempotency-Key": str(number)})) is None:
                    time.sleep(0.3)  # until somebody answers: the loop of kills has the deadline
                accepted[number] = json.loads(answer)["id"]

        clients = [threading.Thread(target=submit, args=(n,)) for n in range(asked.clients)]
        for client in clients:
            client.start()
        for _ in range(asked.kills):
            server.wait_until_ready()
            time.sleep(chance.uniform(0, 3))  # the random moment
            what = chance.choice(["server", "worker", "both"])
            killed[what] += 1
            if what != "server":
                for pid in server.workers():
                    os.kill(pid, signal.SIGKILL)
            if what != "worker":
                server.process.kill()
                server.process.wait()
                server.start()
        for client in clients:
            client.join()
        jobs: dict[str, Any] = {}
        until = time.monotonic() + 10 * PATIENCE
        while len(jobs) < len(accepted):
            for id in accepted.values():
                if id not in jobs and (answer := server.ask("GET", f"/v1/videos/{id}")) is not None:
                    job = json.loads(answer)
                    if job["status"] in ("completed", "failed"):
                        jobs[id] = job
            if time.monotonic() > until:
                raise TimeoutError(f"{len(accepted) - len(jobs)} jobs did not end")
            time.sleep(0.2)  # between two looks at another process
        decoded = 0
        for number, id in accepted.items():
            if jobs[id]["status"] == "completed":
                with av.open(io.BytesIO(server.ask("GET", f"/v1/videos/{id}/content"))) as file:
                    decoded += sum(1 for _ in file.decode(video=0)) == (9 if number % 10 == 0 else 5)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait()
        print(f"kills: {dict(killed)}")
        print(
            f"accepted {len(accepted)}, different {len(set(accepted.values()))}, {dict(Counter(job['status'] for job in jobs.values()))}"
        )
        print(
            f"files that decode whole: {decoded}; attempts: {dict(Counter(job['attempts'] for job in jobs.values()))}"
        )


if __name__ == "__main__":
    main()
