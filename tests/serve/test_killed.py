"""Servers and workers that are killed: no job that was accepted is lost, and none is made twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import av
import pytest

import tiny
from serving import SMALL, Process, ended, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


def submit(server: Process, **fields: object) -> str:
    answer = server.client.post("/v1/videos", json={**SMALL, "model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def running(server: Process, id: str) -> None:
    wait_for(lambda: server.client.get(f"/v1/videos/{id}").json()["step"] > 0)


def test_no_kill_loses_a_job(model, tmp_path):
    """A worker, then the server, then both; and last an end that was asked for."""
    data, long = tmp_path / "data", {"num_inference_steps": 400}
    server = Process(data, model).ready()
    ids = [submit(server, **long), *(submit(server, seed=seed) for seed in range(4))]
    running(server, ids[0])
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: server.client.get(f"/v1/videos/{ids[0]}").json()["attempts"] == 2)
    running(server, ids[0])
    (second,) = server.workers()
    assert second != worker
    orphan = data / "given" / f"video_{'0' * 32}"  # of a server that was killed before it accepted the job
    orphan.write_bytes(b"x")
    server.kill()
    wait_for(lambda: not Path(f"/proc/{second}").exists())  # a worker without a server is no worker
    server = Process(data, model).ready()
    job = server.client.get(f"/v1/videos/{ids[0]}").json()
    assert job["attempts"] in (2, 3) and job["status"] in ("queued", "in_progress")
    running(server, ids[0])
    for pid in server.workers():
        os.kill(pid, signal.SIGTERM)  # as systemd does it, to all at once
    assert server.kill(signal.SIGTERM) == -signal.SIGTERM  # as uvicorn ends, all done
    assert not orphan.exists()
    server = Process(data, model).ready()
    jobs = [ended(server.client, id) for id in ids]
    # What the server itself ended does not count, so this was the third attempt all along.
    assert [(job["status"], job["attempts"]) for job in jobs] == [("completed", 3), *[("completed", 1)] * 4]
    for job in jobs:
        content = server.client.get(f"/v1/videos/{job['id']}/content")
        (tmp_path / "x.mp4").write_bytes(content.content)
        with av.open(str(tmp_path / "x.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == 5
    assert server.kill(signal.SIGTERM) == -signal.SIGTERM  # as uvicorn ends, all done
    assert sorted(path.stem for path in (data / "made").iterdir()) == sorted(ids)
