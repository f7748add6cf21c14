"""The server's routes, with real tiny models in a real worker: what clients send, what they get, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import serving
import tiny
from mxdit.generation.session import Session
from mxdit.serve.app import PAGE
from serving import KEY, SMALL, ended, pixels_of, png
from tiny_families import flux

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    flux.flux_pipeline("t2i").save_pretrained(root / "t2i")
    return {"t2i": root / "t2i"} | {task: tiny.save(root / task, task) for task in ("t2v", "i2v")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def client(models: dict[str, Path], data: Path) -> Iterator[Any]:
    offered = [
        serving.served(models["t2v"]),
        serving.served(models["t2v"], mode="mxfp4"),
        serving.served(models["i2v"], "i2v"),
        serving.served(models["t2i"], "t2i"),
    ]
    with serving.client(data, offered) as found:
        yield found


@pytest.fixture(scope="module")
def listening(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, for clients that are processes of their own."""
    port, offered = serving.free_port(), [serving.served(models["t2v"]), serving.served(models["i2v"], "i2v")]
    listener = serving.Listener(serving.app_of(tmp_path_factory.mktemp("listening"), offered), port)
    yield f"http://127.0.0.1:{port}"
    listener.kill()


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of pixels. FP32 products of two runs may differ in a last bit, and H.264 makes a level of it."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def made(client: Any, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return ended(client, answer.json()["id"])


def test_a_video_is_the_one_that_a_session_makes(client, models, tmp_path):
    job = made(client, seed=7, guidance_scale=3.0)
    assert (job["status"], job["progress"], job["step"], job["attempts"], job["error"]) == (
        "completed",
        100,
        4,
        1,
        None,
    )
    assert job["model"] == "tiny-t2v" and job["seconds"] == "0.3125" and job["size"] == "16x16"
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    answer = client.get(f"/v1/videos/{job['id']}/content")
    assert answer.headers["content-type"] == "video/mp4" and len(answer.content) == job["file_size"]
    session = Session.open(models["t2v"], dtype=serving.served(models["t2v"]).dtype)
    request = session.request(prompt="a red seven", size=(16, 16), frames=5, steps=4, seed=7, guidance=3.0)
    session.run(request).save(tmp_path / "own.mp4")
    own = frames_of((tmp_path / "own.mp4").read_bytes())
    assert apart(frames_of(answer.content), own) < 1
    other = client.get(f"/v1/videos/{made(client, seed=8, guidance_scale=3.0)['id']}/content").content
    assert apart(frames_of(other), own) > 2


def test_what_is_left_out_is_the_models_own(client):
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(listed) == ["tiny-t2v", "tiny-t2v:mxfp4", "tiny-i2v", "tiny-t2i"]
    # The tiny model has the big one's preset, and no room for its size.
    job = client.post("/v1/videos", json={"prompt": "a", "size": "16x16", "num_frames": 5}).json()
    client.post(f"/v1/videos/{job['id']}/cancel")
    defaults = listed["tiny-t2v"]["defaults"]
    asked = job["parameters"]
    for name in ("fps", "num_inference_steps", "guidance_scale", "guidance_scale_2", "negative_prompt"):
        assert asked.get(name) == defaults[name], name
    # Those two stay with the pipeline's files, which say them.
    assert (defaults["flow_shift"], defaults["boundary_ratio"]) == (3.0, 0.875)
    assert "flow_shift" not in asked and "boundary_ratio" not in asked
    assert 0 <= asked["seed"] < 2**31
    ended(client, job["id"])


def test_a_model_says_what_its_linears_really_run_as(client):
    made(client, model="tiny-t2v:mxfp4")
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    linears = 10 * tiny.BLOCKS
    assert listed["tiny-t2v:mxfp4"]["experts"] == {
        name: {"unquantized": 6, "mxfp4 w4a4": linears} for name in ("transformer", "transformer_2")
    }
    assert "input_reference" in listed["tiny-i2v"]["takes"] and "input_reference" not in listed["tiny-t2v"]["takes"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_first_frame_as_a_file_or_as_a_data_uri(client, kind):
    data = png(kind=kind)
    form = {name: str(value) for name, value in SMALL.items()} | {"seed": "1"}
    answer = client.post("/v1/videos", data=form, files={"input_reference": ("../../x.png", data, "image/png")})
    assert answer.status_code == 200, answer.text
    first = ended(client, answer.json()["id"])
    uri = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    second = client.post("/v1/videos", json={**SMALL, "seed": 1, "image_reference": {"image_url": uri}}).json()
    second = ended(client, second["id"])
    assert first["status"] == second["status"] == "completed" and first["model"] == second["model"] == "tiny-i2v"
    assert first["parameters"] == second["parameters"] and first["parameters"]["has_image"]
    assert client.get(f"/v1/videos/{first['id']}/input").content == data
    contents = [client.get(f"/v1/videos/{job['id']}/content").content for job in (first, second)]
    assert apart(*map(frames_of, contents)) < 1


def test_sync_gives_the_video_itself(client):
    form = {name: str(value) for name, value in SMALL.items()}
    answer = client.post("/v1/videos/sync", data=form)
    assert answer.status_code == 200 and answer.headers["x-model"] == "tiny-t2v"
    assert float(answer.headers["x-inference-time-s"]) > 0
    job = client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()
    assert job["status"] == "completed" and len(answer.content) == job["file_size"]


def test_sync_says_whose_fault_it_is_and_that_nobody_shall_try_again(client):
    damaged = {"image_reference": {"image_url": f"data:image/png;base64,{base64.b64encode(png()[:100]).decode()}"}}
    answer = client.post("/v1/videos/sync", json={**SMALL, **damaged})
    wrong = answer.json()["error"]
    assert (answer.status_code, wrong["code"], wrong["param"]) == (400, "invalid_image", "input_reference"), wrong
    assert answer.headers["x-should-retry"] == "false"
    assert client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()["error"]["code"] == "invalid_image"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.post, "/v1/videos/sync", json={**SMALL, "num_inference_steps": 1000})
        newest = "/v1/videos?limit=1"
        running = serving.wait_for(lambda: (job := client.get(newest).json()["data"][0])["steps"] == 1000 and job)
        client.post(f"/v1/videos/{running['id']}/cancel")
        answer = waiting.result(serving.DEADLINE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"] == running["id"]


def test_what_cannot_be_written_is_said_without_the_servers_paths(client, data):
    os.rename(data / "made", data / "away")
    try:
        answer = client.post("/v1/videos/sync", json=SMALL)
    finally:
        os.rename(data / "away", data / "made")
    wrong = answer.json()["error"]
    assert (answer.status_code, wrong["type"]) == (500, "server_error") and "could not be written" in wrong["message"]
    assert str(data) not in answer.text and answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("model", ["tiny-t2i", "tiny-t2v"])
def test_images(client, model):
    """Of a model that makes them, and of a video's one frame; each is a job, and the same seed makes the same."""
    body = {"model": model, "prompt": "a red seven", "size": "32x16", "num_inference_steps": 2, "seed": 3}
    answer = client.post("/v1/images/generations", json={**body, "n": 2, "response_format": "b64_json"})
    assert answer.status_code == 200 and answer.headers["x-model"] == model, answer.text
    told = answer.json()
    assert told["created"] > 1_600_000_000 and told["size"] == "32x16" and len(told["data"]) == 2
    first, second = (pixels_of(base64.b64decode(one["b64_json"])) for one in told["data"])
    assert first.shape == (16, 32, 3) and (first != second).any()
    jobs = [client.get(f"/v1/videos/{one['id']}").json() for one in told["data"]]
    assert [(job["parameters"]["seed"], job["media_type"]) for job in jobs] == [(3, "image/png"), (4, "image/png")]
    again = client.post("/v1/images/generations", json={**body, "seed": 4}).json()["data"][0]
    assert apart(pixels_of(base64.b64decode(again["b64_json"])), second) < 1


def test_a_key_makes_the_same_images(client):
    body = {"prompt": "a red seven", "size": "16x16", "num_inference_steps": 1, "n": 2}
    one, two = (client.post("/v1/images/generations", json=body, headers={"Idempotency-Key": "i"}).json() for _ in "12")
    assert one["data"] == two["data"] and one["data"][0] != one["data"][1]
    other = client.post("/v1/images/generations", json={**body, "seed": 1}, headers={"Idempotency-Key": "i"})
    assert other.status_code == 409


NO_IMAGES: dict[str, tuple[dict[str, Any], int, str]] = {
    "an unknown model": ({"model": "dall-e-3"}, 404, "model"),
    "a model of images to video": ({"model": "tiny-i2v"}, 400, "model"),
    "no prompt": ({"prompt": None}, 400, "prompt"),
    "too many": ({"n": 11}, 400, "n"),
    "an address": ({"response_format": "url"}, 400, "response_format"),
    "a size that does not fit": ({"size": "17x16"}, 400, "size"),
    "a seed that leads too far": ({"seed": 2**63 - 1, "n": 2}, 400, "seed"),
    "what the model does not take": ({"model": "tiny-t2i", "negative_prompt": "blue"}, 400, "negative_prompt"),
    "an unknown field": ({"mask": "x"}, 400, "mask"),
}


@pytest.mark.parametrize("fields, status, param", NO_IMAGES.values(), ids=NO_IMAGES.keys())
def test_what_is_wrong_with_a_request_for_images(client, fields, status, param):
    before = client.get("/v1/videos?limit=1").json()["first_id"]
    answer = client.post("/v1/images/generations", json={"prompt": "a", "size": "16x16", **fields})
    wrong = answer.json()["error"]
    assert (answer.status_code, wrong["param"], wrong["type"]) == (status, param, "invalid_request_error"), wrong
    assert client.get("/v1/videos?limit=1").json()["first_id"] == before


def test_where_nothing_makes_images(models, tmp_path):
    with serving.client(tmp_path, [serving.served(models["i2v"], "i2v")]) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_images_that_the_queue_has_no_room_for_are_none(models, tmp_path):
    with serving.client(tmp_path, [serving.served(models["t2v"])], waiting=3) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "size": "16x16", "n": 10})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        jobs = client.get("/v1/videos").json()["data"]
        assert 3 <= len(jobs) < 10
        assert {job["error"]["code"] for job in (ended(client, job["id"]) for job in jobs)} == {"cancelled"}


# What vLLM-Omni's pages on text and image to video give to curl, at a size that tiny models have.
CURL = {
    "t2v": (
        *("-H", "Accept: application/json", "-F", "width=16", "-F", "height=16", "-F", "num_frames=80"),
        *(
            "-F",
            "negative_prompt=\u8272\u8c03\u8273\u4e3d \uff0c\u8fc7\u66dd",
            "-F",
            "fps=16",
            "-F",
            "guidance_scale=4.0",
        ),
        *("-F", "guidance_scale_2=4.0", "-F", "boundary_ratio=0.875", "-F", "flow_shift=5.0", "-F", "seed=42"),
    ),
    "t2v by its length": ("-F", "seconds=2", "-F", "size=16x16", "-F", "fps=16", "-F", "seed=42"),
    "i2v": (
        *(
            "-F",
            "input_reference=@first.png",
            "-F",
            "width=16",
            "-F",
            "height=16",
            "-F",
            "num_frames=33",
            "-F",
            "fps=16",
        ),
        *(
            "-F",
            "guidance_scale=1.0",
            "-F",
            "guidance_scale_2=1.0",
            "-F",
            "boundary_ratio=0.875",
            "-F",
            "flow_shift=12.0",
        ),
    ),
    "i2v by a data URI": (
        "--form-string",
        'image_reference={"image_url": "data:image/png;base64,PNG"}',
        "-F",
        "size=16x16",
    ),
}


@pytest.mark.parametrize("line", CURL)
def test_the_lines_of_vllm_omnis_documents(models, listening, tmp_path, line):
    (tmp_path / "first.png").write_bytes(png(16, 16))
    data = base64.b64encode(png(16, 16)).decode()
    given = [part.replace("PNG", data) for part in CURL[line]]
    steps = ("-F", "prompt=Two cats; a stage", "-F", "num_inference_steps=2")

    def curl(*arguments: str) -> bytes:
        command = ["curl", "-sS", "--fail", *arguments]
        return subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=serving.DEADLINE).stdout

    videos = f"{listening}/v1/videos"
    video = json.loads(curl(videos, *steps, *given))
    until = time.monotonic() + serving.DEADLINE
    while (job := json.loads(curl(f"{videos}/{video['id']}")))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert job["status"] == "completed", job
    made = curl("-L", f"{videos}/{video['id']}/content")
    assert made[4:8] == b"ftyp" and job["num_frames"] == {"t2v": 81, "t2v by its length": 33}.get(
        line, job["num_frames"]
    )
    assert curl("-X", "POST", f"{videos}/sync", *steps, *given)[4:8] == b"ftyp"
    assert json.loads(curl("-X", "DELETE", f"{videos}/{video['id']}"))["deleted"]


def test_events_tell_every_state_up_to_the_end(client):
    id = client.post("/v1/videos", json={**SMALL, "num_inference_steps": 8}).json()["id"]
    with client.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        told = "".join(answer.iter_text())
    events = [
        dict(line.split(": ", 1) for line in event.splitlines())
        for event in told.strip().split("\n\n")
        if event[0] != ":"
    ]
    assert [event["event"] for event in events] == ["progress"] * (len(events) - 1) + ["done"]
    last = json.loads(events[-1]["data"])
    assert last["status"] == "completed" and last["progress"] == 100
    steps = [json.loads(event["data"])["step"] for event in events]
    assert steps == sorted(steps)


def test_a_running_job_stops_within_a_step_and_leaves_no_file(client):
    id = client.post("/v1/videos", json={**SMALL, "num_inference_steps": 1000}).json()["id"]
    running = serving.wait_for(lambda: (job := client.get(f"/v1/videos/{id}").json())["step"] > 1 and job)
    assert running["status"] == "in_progress" and running["eta_seconds"] > 0 and running["progress"] < 100
    assert client.get(f"/v1/videos/{id}/content").status_code == 409
    asked = client.post(f"/v1/videos/{id}/cancel").json()["step"]
    job = ended(client, id)
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled") and job["step"] - asked < 20
    assert client.get(f"/v1/videos/{id}/content").status_code == 409
    assert client.post(f"/v1/videos/{id}/cancel").status_code == 409
    assert made(client)["status"] == "completed"  # the worker goes on


def test_deleting_a_running_job_and_one_that_waits(client):
    ids = [client.post("/v1/videos", json={**SMALL, "num_inference_steps": 1000}).json()["id"] for _ in range(2)]
    serving.wait_for(lambda: client.get(f"/v1/videos/{ids[0]}").json()["step"])
    assert client.get(f"/v1/videos/{ids[1]}").json()["queue_position"] == 0
    for id in reversed(ids):
        assert client.delete(f"/v1/videos/{id}").json() == {"id": id, "object": "video.deleted", "deleted": True}
        assert client.get(f"/v1/videos/{id}").status_code == 404
        assert client.delete(f"/v1/videos/{id}").status_code == 404
    assert made(client)["status"] == "completed"


def test_lists(client):
    made(client), made(client)
    first = client.get("/v1/videos", params={"limit": 1}).json()
    assert first["has_more"] and first["first_id"] == first["last_id"] == first["data"][0]["id"]
    second = client.get("/v1/videos", params={"limit": 1, "after": first["last_id"]}).json()
    assert second["data"][0]["created_at"] <= first["data"][0]["created_at"] and second["data"] != first["data"]
    oldest = client.get("/v1/videos", params={"limit": 1, "order": "asc"}).json()["data"][0]
    assert oldest["created_at"] <= second["data"][0]["created_at"]


def test_the_same_key_gives_the_same_job(client):
    head = {"Idempotency-Key": "once"}
    one, two = (client.post("/v1/videos", json=SMALL, headers=head).json() for _ in range(2))
    assert one["id"] == two["id"]
    other = client.post("/v1/videos", json={**SMALL, "seed": 5}, headers=head)
    assert other.status_code == 409 and other.json()["error"]["param"] == "Idempotency-Key"
    ended(client, one["id"])


def test_figures(client):
    made(client)
    told = client.get("/metrics").text
    assert 'mxdit_jobs{status="completed"}' in told and 'mxdit_model_loaded{model="tiny-t2v"} 1.0' in told
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    figures = {sample.name: sample for family in text_string_to_metric_families(told) for sample in family.samples}
    assert figures["mxdit_step_seconds_sum"].value > 0
    assert figures["mxdit_step_seconds_count"].labels["model"] in listed
    for name in ("mxdit_worker_memory_bytes", "mxdit_job_peak_bytes"):
        assert figures[name].labels == {"device": "cpu"} and figures[name].value > 1 << 20
    assert figures["process_resident_memory_bytes"].value > 1 << 20
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").status_code == 200


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "a size that does not fit": ({"size": "17x16"}, 400, "size"),
    "no size": ({"size": "large"}, 400, "size"),
    "no frames": ({"num_frames": 0}, 400, "num_frames"),
    "no steps": ({"num_inference_steps": 0}, 400, "num_inference_steps"),
    "steps that are no number": ({"num_inference_steps": "many"}, 400, "num_inference_steps"),
    "guidance that is infinite": ({"guidance_scale": 1e300}, 400, "guidance_scale"),
    "an empty prompt": ({"prompt": "  "}, 400, "prompt"),
    "a prompt that is a list": ({"prompt": ["a"]}, 400, "prompt"),
    "an unknown model": ({"model": "sora"}, 404, "model"),
    "an unknown field": ({"n": 2}, 400, "n"),
    "an unknown parameter": ({"extra_params": {"x": 1}}, 400, "extra_params"),
    "steps that are none": ({"model": "tiny-t2v:mxfp4", "extra_params": {"activation_steps": {"mxfp8": [99]}}}, 400, "activation_steps"),
    "a seed below zero": ({"seed": -1}, 400, "seed"),
    "an image for text-to-video": ({"model": "tiny-t2v", "image_reference": {"image_url": "data:image/png;base64," + base64.b64encode(png()).decode()}}, 400, "input_reference"),
    "no image for image-to-video": ({"model": "tiny-i2v"}, 400, "input_reference"),
    "an address": ({"image_reference": {"image_url": "http://169.254.169.254/"}}, 400, "image_reference"),
    "a file": ({"image_reference": {"image_url": "file:///etc/passwd"}}, 400, "image_reference"),
    "an image that is none": ({"image_reference": {"image_url": "data:image/png;base64,AAAA"}}, 400, "input_reference"),
    "half a width": ({"width": 16}, 400, "height"),
}  # fmt: skip


@pytest.mark.parametrize("fields, status, param", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_said_by_the_fields_name(client, fields, status, param):
    answer = client.post("/v1/videos", json={**SMALL, **fields})
    wrong = answer.json()["error"]
    assert (answer.status_code, wrong["param"]) == (status, param), wrong
    assert wrong["message"] and wrong["type"] == "invalid_request_error"


def test_what_is_too_large_is_not_read(client):
    answer = client.post("/v1/videos", content=b"x" * (2 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * (64 << 10)

    answer = client.post("/v1/videos", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413  # without a length, too


def test_keys(models, tmp_path):
    with serving.client(tmp_path, [serving.served(models["t2v"])], keys=("another-key-that-fits", KEY)) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": KEY},
        ):
            answer = client.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert client.post("/v1/videos", json=SMALL, headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/health").status_code == 200
        answer = client.get("/v1/models")
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_page_is_whole_and_asks_nobody_else(client):
    """Every file that it names is there, and no other host is named in it."""
    names, seen = ["/", "/docs"], set()
    while names:
        name = names.pop()
        answer = client.get(name)
        assert answer.status_code == 200, name
        seen.add(name)
        found = re.findall(r'(?:src|href)="(/page/[^"]+)"', answer.text)
        found += [f"/page/{file}" for file in re.findall(r'from "\./([^"]+)"', answer.text)]
        assert not re.search(r"https?://", answer.text), name
        assert "innerHTML" not in answer.text and "style=" not in answer.text, name
        for file in found:
            if file.startswith("/page/swagger-ui/"):  # others' work, which tests/web watches
                assert client.get(file).status_code == 200, file
            elif file not in seen:
                names.append(file)
    assert len(seen) == len(list(PAGE.iterdir()))  # index.html is "/", docs.html "/docs"
    assert client.get("/page/../app.py").status_code == 404 and client.get("/page/%2e%2e/app.py").status_code == 404


def test_a_full_queue_says_when_to_come_back(models, tmp_path):
    with serving.client(tmp_path, [serving.served(models["t2v"])], waiting=1) as client:
        slow = {**SMALL, "num_inference_steps": 1000}
        running = client.post("/v1/videos", json=slow).json()["id"]
        serving.wait_for(lambda: client.get(f"/v1/videos/{running}").json()["status"] == "in_progress")
        assert client.post("/v1/videos", json=slow).status_code == 200
        answer = client.post("/v1/videos", json=slow)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "10"
        assert answer.json()["error"]["code"] == "queue_full"


def test_the_openai_package_as_it_is(client):
    """It is pinned: OpenAI closed its own service, and the package may drop it."""
    import openai

    theirs = openai.OpenAI(api_key=KEY, base_url=f"{client.base_url}/v1", http_client=client, max_retries=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        extra = {"num_frames": 5, "num_inference_steps": 4}
        video = theirs.videos.create_and_poll(prompt="a red seven", size="16x16", extra_body=extra, poll_interval_ms=50)
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        assert len(theirs.videos.download_content(video.id).read()) > 1000
        assert theirs.videos.list(limit=1).data[0].id == video.id
        with pytest.raises(openai.BadRequestError) as wrong:
            theirs.videos.create(prompt="a", size="17x16", extra_body=extra)
        assert wrong.value.param == "size"
        assert theirs.videos.delete(video.id).deleted
        image = theirs.images.generate(prompt="a red seven", size="16x16", extra_body={"num_inference_steps": 2})
        assert pixels_of(base64.b64decode(image.data[0].b64_json)).shape == (16, 16, 3)
        with pytest.raises(openai.NotFoundError):
            theirs.videos.retrieve(video.id)
