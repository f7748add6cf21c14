"""`vllm-omni serve`, asked by the SDK of OpenAI and by curl: create, poll, content, delete."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest

import engine
import quantized
import server

# What is served: a task, its experts' config where they are packed, and arguments of the command line.
SERVED: dict[str, tuple[str, dict[str, Any] | None, tuple[str, ...]]] = {
    "t2v-packed": ("t2v", {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}, ()),
    "i2v-online-tp2": ("i2v", None, ("--quantization", "mxfp4", "--tensor-parallel-size", "2")),
}
SIZE = f"{engine.SAMPLING['width']}x{engine.SAMPLING['height']}"
FIELDS = {key: value for key, value in engine.SAMPLING.items() if key not in ("width", "height")} | {"seed": 42}


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, directories, tmp_path_factory) -> Iterator[tuple[str, Path | None]]:
    """The address of a server, and the first frame that its model needs."""
    task, config, arguments = SERVED[request.param]
    folder, directory = tmp_path_factory.mktemp("server"), directories[task]
    if config is not None:
        directory = quantized.write(directory, folder / "model", dict.fromkeys(quantized.EXPERTS, config))
    with server.serving(directory, folder, *arguments) as address:
        log = (folder / "log.txt").read_text()
        assert "mxdit mxfp4" in log, "the server runs without mxdit's linears"
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


def curl(address: str, *arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail", address, *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=engine.TIMEOUT).stdout


def assert_video(content: bytes) -> None:
    """An mp4 of the size that was asked for, which shows something."""
    with av.open(io.BytesIO(content), mode="r") as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == (engine.SAMPLING["num_frames"], engine.SAMPLING["height"], engine.SAMPLING["width"], 3)
    assert frames.min() < frames.max()
