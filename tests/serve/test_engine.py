"""`mxdit serve --engine`: a durable queue in front of engines that fail."""

from __future__ import annotations

import io
import signal
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import av
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

import tiny
from engines import FRAMES, FakeEngine
from mxdit.client import Client
from mxdit.serve import engine as engine_module
from mxdit.serve.app import make_app
from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.engine import EngineRunner, Engines
from mxdit.serve.files import Files
from mxdit.serve.jobs import Jobs
from serving import KEY, Listener, Process, app_of, ended, free_port, served, wait_for

NOTED = "SELECT 1 FROM jobs WHERE status = 'in_progress' AND remote IS NOT NULL"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "ASK", 0.02)
    monkeypatch.setattr(engine_module, "HEALTH", 0.2)
    monkeypatch.setattr(engine_module, "LOST", 0.5)


@contextmanager
def front(data: Path, *addresses: str, key: str | None = None) -> Iterator[TestClient]:
    """A client of a server in this process, in front of these engines."""
    data.mkdir(exist_ok=True)
    offer, jobs = Engines(addresses), Jobs(data / "jobs.sqlite")
    runners = [EngineRunner(address, offer, key) for address in addresses]
    with TestClient(
        make_app(offer, jobs, Dispatcher(jobs, Files(data), runners)), raise_server_exceptions=False
    ) as found:
        yield found


@contextmanager
def engines(*faults: dict[str, float], takes: float = 0.1) -> Iterator[list[FakeEngine]]:
    found = [FakeEngine(takes=takes, faults=each, seed=number).start() for number, each in enumerate(faults)]
    try:
        yield found
    finally:
        for one in found:
            one.kill()


def shade(content: bytes) -> float:
    """Of a video that decodes to as many frames as it should."""
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == FRAMES
    return float(np.mean(frames))


def test_what_an_engine_is_asked(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(image, "PNG")
    with engines({}) as (engine,), front(tmp_path, engine.address) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["owned_by"], model["defaults"]) == ("wan", "vllm-omni", {})
        fields = {
            "prompt": "a red seven", "size": "16x8", "num_frames": 5, "num_inference_steps": 4, "seed": 7, "fps": 16,
            "negative_prompt": "blue", "guidance_scale": 4.0, "guidance_scale_2": 3.0, "flow_shift": 5.0, "boundary_ratio": 0.5,
            "extra_params": '{"mine": [1]}',
        }  # fmt: skip
        files = {"input_reference": ("first.png", image.getvalue())}
        first = http.post("/v1/videos", data=fields, files=files).json()
        done = ended(http, first["id"])
        assert (done["status"], done["progress"], done["attempts"], done["steps"]) == ("completed", 100, 1, None)
        assert done["size"] == "16x16"  # the fake makes no other
        assert done["inference_time_s"] == 0.1 and done["parameters"]["seed"] == 7
        (form,) = engine.forms
        assert form.pop("input_reference") == image.getvalue()
        assert form.pop("extra_params") == '{"mine": [1]}' and form.pop("model") == "wan"
        assert form == {name: str(value) for name, value in fields.items() if name != "extra_params"}
        assert abs(shade(http.get(f"/v1/videos/{first['id']}/content").content) - 7) < 6
        assert engine.deleted == [("a red seven", "completed")]  # and keeps nothing
        second = http.post("/v1/videos", json={"prompt": "a", "seconds": 2}).json()
        assert second["seconds"] == "2" and second["size"] is None
        done = ended(http, second["id"])
        assert (done["status"], done["size"], done["seconds"]) == ("completed", "16x16", "0.3125")  # what the file is
        assert done["parameters"]["num_frames"] == FRAMES and done["parameters"]["fps"] == 16
        assert engine.forms[1].keys() == {"prompt", "seconds", "seed", "model"}  # the rest is the engine's choice
        for wrong, param in (
            ({}, "prompt"),
            ({"prompt": "a", "seconds": 1.5}, "seconds"),
            ({"prompt": "a", "model": "b"}, "model"),
        ):
            refused = http.post("/v1/videos", json=wrong)
            assert 400 <= refused.status_code < 500 and refused.json()["error"]["param"] == param
        refused = http.post("/v1/videos", json={"prompt": "a", "negative_prompt": "impossible"}).json()
        failed = ended(http, refused["id"])
        assert failed["error"] == {"code": "failed", "message": "400: no such size"} and failed["attempts"] == 1
        metrics = http.get("/metrics").text
        assert f'mxdit_engine_up{{engine="{engine.address}"}} 1.0' in metrics


def test_the_openai_package_in_front_of_two_that_fail_at_random(tmp_path):
    """Both answer nonsense, lose requests and files, and die twice; every job ends, and what is completed is whole."""
    faults = {
        "busy": 0.1,
        "refuses": 0.05,
        "drops the answer": 0.05,
        "job fails": 0.1,
        "html": 0.1,
        "cuts the file": 0.15,
    }
    with engines(faults, faults, takes=0.05) as both, front(tmp_path, *(one.address for one in both)) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        client = openai.OpenAI(api_key="none", base_url=f"{http.base_url}/v1", http_client=http, max_retries=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            ids = [client.videos.create(prompt=f"number {n}", extra_body={"seed": n}).id for n in range(40)]
            for n, engine in zip((10, 15, 20, 25), both * 2, strict=True):
                client.videos.poll(ids[n], poll_interval_ms=20)
                engine.kill()
                time.sleep(0.3)
                engine.start()
            videos = [client.videos.poll(id, poll_interval_ms=20) for id in ids]
            for n, video in enumerate(videos):
                if video.status == "completed":
                    assert abs(shade(client.videos.download_content(video.id).read()) - n) < 6
                else:
                    job = http.get(f"/v1/videos/{video.id}").json()
                    assert job["attempts"] == 3 and job["error"]["code"] == "engine_failed" and job["error"]["message"]
            assert sum(video.status == "completed" for video in videos) >= 36
        assert all(one.made for one in both)  # both had their share
        assert {*both[0].faulted, *both[1].faulted} == {*faults}  # and everything happened
        assert not list((tmp_path / "made").glob(".*"))


def test_an_engine_that_is_gone_gives_its_jobs_to_another(tmp_path):
    with engines({}, {}, takes=30.0) as (first, second), front(tmp_path, first.address) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        id = http.post("/v1/videos", json={"prompt": "long"}).json()["id"]
        wait_for(lambda: first.running() == ["long"])
        first.kill()
        time.sleep(1)  # alone, it is waited for
        assert http.get(f"/v1/videos/{id}").json()["status"] == "in_progress"
        first.start()
        wait_for(lambda: len(first.forms) == 2)  # it has forgotten the job, and gets it again
        assert http.get(f"/v1/videos/{id}").json()["attempts"] == 2
    with engines({}, {}, takes=0.2) as (first, second), front(tmp_path / "two", first.address, second.address) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        first.takes = second.takes = 30.0
        ids = [http.post("/v1/videos", json={"prompt": f"long {n}"}).json()["id"] for n in range(2)]
        wait_for(lambda: len(first.running()) == len(second.running()) == 1)
        (lost,) = first.running()
        first.kill()
        second.takes = 0.1
        http.post(f"/v1/videos/{ids[1 - int(lost[-1])]}/cancel")  # what the second is at
        wait_for(lambda: second.made == [lost])
        job = ended(http, ids[int(lost[-1])])
        assert (job["status"], job["attempts"]) == ("completed", 2)


@pytest.mark.parametrize("fault", ["busy", "drops the answer"])
def test_what_no_engine_took_counts_as_no_attempt(tmp_path, fault):
    with engines({fault: 1.0}) as (engine,), front(tmp_path, engine.address) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        id = http.post("/v1/videos", json={"prompt": "a"}).json()["id"]
        wait_for(lambda: engine.faulted.get(fault, 0) > 3)
        engine.faults.clear()
        job = ended(http, id)
        assert (job["status"], job["attempts"]) == ("completed", 1)


def test_without_an_engine_it_waits(tmp_path):
    engine = FakeEngine()
    with front(tmp_path, engine.address) as http:
        assert http.get("/ready").status_code == 503
        early = http.post("/v1/videos", json={"prompt": "a"})
        assert (
            early.status_code == 503 and "engine" in early.json()["error"]["message"] and early.headers["retry-after"]
        )
        engine.start()
        wait_for(lambda: http.get("/ready").status_code == 200)
        engine.kill()
        id = http.post("/v1/videos", json={"prompt": "a"}).json()["id"]  # its models are known, so the job can wait
        engine.start()
        job = ended(http, id)
        assert (job["status"], job["attempts"]) == ("completed", 1)
        engine.kill()


def test_cancelling_and_forgetting_reach_the_engine(tmp_path):
    with engines({"deletes later": 1.0}, takes=30.0) as (engine,), front(tmp_path, engine.address) as http:
        wait_for(lambda: http.get("/ready").status_code == 200)
        ids = [http.post("/v1/videos", json={"prompt": f"number {n}"}).json()["id"] for n in range(2)]
        for n, id in enumerate(ids):
            wait_for(lambda n=n: engine.running() == [f"number {n}"])
            if n == 0:
                http.post(f"/v1/videos/{id}/cancel")
                assert ended(http, id)["error"]["code"] == "cancelled"
                wait_for(lambda: engine.faulted.get("deletes later", 0) > 1)  # it is asked again
                engine.faults.clear()
            else:
                assert http.delete(f"/v1/videos/{id}").json()["deleted"]
        wait_for(lambda: engine.deleted == [("number 0", "in_progress"), ("number 1", "in_progress")])
        assert http.get(f"/v1/videos/{ids[1]}").status_code == 404


def test_another_mxdit_is_an_engine_that_tells_steps(tmp_path):
    """And what it offers is told on."""
    path = tiny.save(tmp_path / "tiny")
    (tmp_path / "there").mkdir()
    port = free_port()
    there = Listener(app_of(tmp_path / "there", [served(path)], keys=(KEY,)), port)
    try:
        with front(tmp_path / "here", f"http://127.0.0.1:{port}", key=KEY) as http:
            wait_for(lambda: http.get("/ready").status_code == 200)
            (model,) = http.get("/v1/models").json()["data"]
            assert (model["task"], model["name"]) == ("t2v", "tiny-t2v") and model["defaults"]["fps"]
            fields = {"prompt": "a", "size": "16x16", "num_frames": 5, "num_inference_steps": 400}
            id = http.post("/v1/videos", json=fields).json()["id"]
            wait_for(lambda: (http.get(f"/v1/videos/{id}").json()["step"] or 0) > 2)
            assert http.get(f"/v1/videos/{id}").json()["steps"] == 400
            job = ended(http, id)
            assert (job["status"], job["step"], job["steps"]) == ("completed", 400, 400)
            bad = http.post("/v1/videos", json={**fields, "size": "17x16"}).json()
            failed = ended(http, bad["id"])
            assert failed["error"]["code"] == "invalid_value" and "size" in failed["error"]["message"]
        with Client(f"http://127.0.0.1:{port}", api_key=KEY) as client:
            assert not client.list()
    finally:
        there.kill()


def test_a_restart_finds_its_job_at_the_engine(tmp_path):
    """SIGKILL and SIGTERM of the server in front: the engine goes on, and is asked once."""
    data, id = tmp_path / "data", ""
    with engines({}, takes=600.0) as (engine,):
        for how in (signal.SIGKILL, signal.SIGTERM):
            server = Process(data, args=("--engine", engine.address)).ready()
            id = id or server.client.post("/v1/videos", json={"prompt": "long"}).json()["id"]
            wait_for(lambda: engine.running() == ["long"])
            with closing(sqlite3.connect(data / "jobs.sqlite")) as db:
                wait_for(lambda db=db: db.execute(NOTED).fetchone())
            server.kill(how)
        (job,) = engine._jobs.values()
        job.update(status="completed", progress=100, file_name="a.mp4", inference_time_s=600.0)
        server = Process(data, args=("--engine", engine.address)).ready()
        done = ended(server.client, id)
        assert (done["status"], done["attempts"], len(engine.forms)) == ("completed", 1, 1)
        assert shade(server.client.get(f"/v1/videos/{id}/content").content) >= 0
        server.kill(signal.SIGTERM)
