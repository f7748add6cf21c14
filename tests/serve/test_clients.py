"""`mxdit.client` and `mxdit client` against a server that users start."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator

import av
import pytest
from PIL import Image

import tiny
from command import mxdit_command
from mxdit.client import AsyncClient, Client, ServerError, Video, VideoFailed
from serving import KEY, Process

SMALL = {"size": "16x16", "num_frames": 5, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "keys").write_text(f"{KEY}\n")
    models = [tiny.save(folder / "tiny"), tiny.save(folder / "tiny-i2v", task="i2v")]
    found = Process(folder / "data", *models, args=("--api-key-file", str(folder / "keys"))).ready()
    yield found
    found.kill()


def test_a_video_from_the_first_to_the_last(server, tmp_path):
    with Client(server.url, api_key=KEY) as client:
        told: list[Video] = []
        video = client.submit("a red seven", seed=5, idempotency_key="one", **SMALL)
        assert client.submit("a red seven", seed=5, idempotency_key="one", **SMALL).id == video.id
        done = client.wait(video.id, told=told.append)
        steps = [video.step for video in told if video.status == "in_progress"]
        assert steps and steps == sorted(steps) and (done.step, done.steps, done.progress) == (4, 4, 100)
        assert done.parameters["seed"] == 5 and done.error is None
        path = client.download(video.id, tmp_path)
        with av.open(str(path)) as container:
            assert path.stem == video.id and sum(1 for _ in container.decode(video=0)) == 5
        assert [other.id for other in client.list(1)] == [video.id] and client.get(video.id) == done
        client.delete(video.id)
        with pytest.raises(ServerError, match="no such video") as gone:
            client.get(video.id)
        assert (gone.value.status, gone.value.code) == (404, "not_found")
        assert {model["id"] for model in client.models()} == {"tiny", "tiny-i2v"}


def test_an_image_a_cancelled_job_and_a_wrong_one(server):
    image = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(image, "PNG")

    async def of() -> None:
        async with AsyncClient(server.url, api_key=KEY) as client:
            done, long = await asyncio.gather(
                client.submit("a", image=image.getvalue(), **SMALL),
                client.submit("a", model="tiny", **{**SMALL, "num_inference_steps": 900}),
            )
            async for video in client.events(long.id):
                if video.step:
                    await client.cancel(long.id)
                    break
            with pytest.raises(VideoFailed) as failed:
                await client.wait(long.id)
            assert failed.value.video.error_code == "cancelled" and failed.value.video.step < 900
            assert (await client.wait(done.id)).model == "tiny-i2v"
            with pytest.raises(ServerError, match=r"size: .*expected") as refused:
                await client.submit("a", **{**SMALL, "size": "17x16"})
            assert refused.value.status == 400

    asyncio.run(of())


def test_the_command(server, tmp_path, monkeypatch, capsys):
    def command(*arguments: str, code: int = 0, own: tuple[str, ...] | None = None) -> tuple[str, str]:
        """(stdout, stderr) of a call that ends so."""
        own = ("--api-key-file", str(key)) if own is None else own
        ended, printed, told = mxdit_command(monkeypatch, capsys, "client", *arguments, "--url", server.url, *own)
        assert ended == code and "Traceback" not in told, told
        return printed, told

    key = tmp_path / "key"
    key.write_text(f"# mine\n{KEY}\n")
    prompt = "[red]a[/red] <b>seven</b>"
    small = ("--size", "16x16", "--frames", "5", "--steps", "4", "--seed", "2", "--model", "tiny")
    output = tmp_path / "a.mp4"
    printed, told = command("submit", prompt, *small, "-o", str(output))
    assert printed.replace("\n", "") == str(output) and output.read_bytes()[4:8] == b"ftyp"
    (job,) = [job for job in json.loads(command("list", "--json")[0]) if job["prompt"] == prompt]
    assert job["id"] in told and job["parameters"]["seed"] == 2
    listed = command("list")[0]
    assert job["id"] in listed and "[red]" in listed and "4 of 4" in command("get", job["id"])[0]
    id = command("submit", "long", *small[:5], "900", "--model", "tiny")[0].strip()
    assert id in command("cancel", id)[0]
    assert "the job was cancelled" in command("wait", id, code=2)[1]
    assert "multiple" in command("submit", "a", "--size", "17x16", "--model", "tiny", code=2)[1]
    assert "a valid API key is needed" in command("list", code=2, own=())[1]
    assert "--output" in command("wait", id, "-o", str(tmp_path / "no" / "a.mp4"), code=2)[1]
    assert "--extra" in command("submit", "a", "--extra", "[1]", code=2)[1]
    command("delete", id)
    assert "no such video" in command("get", id, code=2)[1]
    assert "tiny-i2v" in command("models")[0]
