"""`vllm-omni serve`, asked by the SDK of OpenAI and by curl: create, poll, content, delete."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest

import engine
import quantized
import server
from mxdit.client import Client, ServerError, Unreachable

# What is served: a task, its experts' config where they are packed, and arguments of the command line.
SERVED: dict[str, tuple[str, dict[str, Any] | None, tuple[str, ...]]] = {
    "t2v-packed": ("t2v", {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, ()),
    "i2v-online-tp2": ("i2v", None, ("--quantization", "mxfp4", "--tensor-parallel-size", "2")),
}
SIZE = f"{engine.SAMPLING['width']}x{engine.SAMPLING['height']}"
FIELDS: dict[str, Any] = {key: value for key, value in engine.SAMPLING.items() if key not in ("width", "height")} | {
    "seed": 42
}


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, directories, tmp_path_factory) -> Iterator[tuple[str, Path | None]]:
    """The address of a server, and the first frame that its model needs."""
    task, config, arguments = SERVED[request.param]
    folder, directory = tmp_path_factory.mktemp("server"), directories[task]
    if config is not None:
        directory = quantized.write(directory, folder / "model", dict.fromkeys(quantized.EXPERTS, config))
    with server.serving(directory, folder, *arguments) as address:
        log = (folder / "log.txt").read_text()
        assert re.search(r"mxdit: \d+ mxfp4", log), "the server runs without mxdit's linears"
        yield address, engine.IMAGE if task == "i2v" else None


def test_the_sdk(served):
    address, image = served
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=engine.TIMEOUT)
    request: dict[str, Any] = {"prompt": engine.PROMPT["prompt"], "size": SIZE, "extra_body": FIELDS}
    if image is not None:
        request["input_reference"] = image
    video = client.videos.create(**request)
    done = client.videos.poll(video.id, poll_interval_ms=200)
    assert done.status == "completed", done.error
    assert_video(client.videos.download_content(video.id).read())
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_curl(served):
    address, image = served
    fields = {"prompt": engine.PROMPT["prompt"], "size": SIZE, **FIELDS}
    form = [f"{key}={value}" for key, value in fields.items()]
    if image is not None:
        form.append(f"input_reference=@{image};type=image/png")
    video = json.loads(curl(f"{address}/v1/videos", *(part for field in form for part in ("-F", field))))
    one = f"{address}/v1/videos/{video['id']}"
    deadline = time.monotonic() + engine.TIMEOUT
    while (job := json.loads(curl(one)))["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    assert job["status"] == "completed"
    assert_video(curl(f"{one}/content"))
    assert json.loads(curl(one, "-X", "DELETE"))["deleted"]
    with pytest.raises(subprocess.CalledProcessError):
        curl(one)


def test_a_durable_queue_in_front(served, tmp_path):
    """`mxdit serve --engine`, killed while jobs wait and run."""
    address, image = served
    with in_front(address, tmp_path) as client:
        ids = [client.submit(image=image, size=SIZE, **engine.PROMPT, **FIELDS).id for _ in range(3)]
        deadline = time.monotonic() + engine.TIMEOUT
        while client.get(ids[0]).status == "queued":
            assert time.monotonic() < deadline
    with in_front(address, tmp_path) as client:
        (model,) = client.models()
        videos = [client.wait(id) for id in ids]
        for video in videos:
            assert_video(client.download(video.id, tmp_path).read_bytes())
            assert video.model == model["id"] and video.parameters["seed"] == FIELDS["seed"]
            assert video.raw["size"] == SIZE and video.raw["num_frames"] == engine.SAMPLING["num_frames"]
        assert [video.attempts for video in videos] == [1, 1, 1]
        with pytest.raises(ServerError, match="no such model"):
            client.submit("a", model="another")


@pytest.mark.parametrize("served", ["t2v-packed"], indirect=True)  # its prompts from a file have no images
def test_the_engines_own_benchmark(served, tmp_path):
    """`vllm-omni bench serve --omni`, unmodified, asks `mxdit serve --engine`."""
    address, _ = served
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red seven"}\n' * 2)
    with in_front(address, tmp_path) as client:
        (model,) = client.models()
        asked = {"size": SIZE, "poll_interval_s": 0.2, **FIELDS}
        program = Path(sys.executable).with_name("vllm-omni")
        command = [
            program, "bench", "serve", "--omni", "--base-url", client.url, "--endpoint", "/v1/videos", "--model", model["id"],
            "--skip-tokenizer-init", "--dataset-name", "custom", "--dataset-path", prompts, "--custom-output-len", "1",
            "--num-prompts", "2", "--extra-body", json.dumps(asked),
        ]  # fmt: skip
        log = tmp_path / "bench.txt"
        with log.open("w") as output:
            subprocess.run([*map(str, command)], stdout=output, stderr=output, timeout=engine.TIMEOUT)
        told = log.read_text()
    figures = dict(re.findall(r"^([^:\n]+):\s+([\d.]+) *$", told, re.MULTILINE))
    assert (figures["Successful requests"], figures["Failed requests"]) == ("2", "0"), told
    assert int(figures["Total video frames generated"]) == 2 * engine.SAMPLING["num_frames"]


@contextmanager
def in_front(address: str, folder: Path) -> Iterator[Client]:
    """A client of `mxdit serve --engine`, which is killed at the end and finds its jobs again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("mxdit")
    command = [program, "serve", "--engine", address, "--data", str(folder / "data"), "--port", str(port)]
    front = engine.start(command, folder / f"{port}.txt", {})
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + engine.TIMEOUT
            while True:
                assert front.poll() is None and time.monotonic() < deadline, (folder / f"{port}.txt").read_text()
                with suppress(Unreachable):
                    if client.models():
                        break
                time.sleep(0.2)
            yield client
    finally:
        front.kill()
        engine.stop(front)


def curl(address: str, *arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail", address, *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=engine.TIMEOUT).stdout


def assert_video(content: bytes) -> None:
    """An mp4 of the size that was asked for, which shows something."""
    with av.open(io.BytesIO(content), mode="r") as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (engine.SAMPLING["num_frames"], engine.SAMPLING["height"], engine.SAMPLING["width"], 3)
    assert frames.min() < frames.max()
