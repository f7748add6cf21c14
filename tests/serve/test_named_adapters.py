"""Adapters of a server's data directory: listed, asked for by name, switched from job to job, and nothing of a path's tricks."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loras
import serving
import tiny
from command import mxdit_command
from mxdit.client import Client, ServerError
from mxdit.config.loras import LoraFile
from mxdit.generation.session import Session
from mxdit.serve.adapters import COUNT, Shelf
from mxdit.serve.app import make_app
from mxdit.serve.dispatch import Dispatcher
from mxdit.serve.engine import EngineRunner, Engines
from mxdit.serve.files import Files
from mxdit.serve.jobs import Jobs
from serving import SMALL, ended
from test_api import apart, frames_of, pixels_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "t2v")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    shelf = data / "adapters"
    loras.made(shelf / "style" / "transformer.safetensors")
    loras.made(shelf / "style" / "transformer_2.safetensors", seed=1)
    loras.save(shelf / "late" / "transformer_2.safetensors", loras.original(loras.layers(seed=2), alpha=2.0))
    loras.made(shelf / "single.safetensors")
    wrong = loras.layers(tiny.transformer(num_layers=3))
    loras.save(shelf / "wrong" / "transformer.safetensors", loras.diffusers(wrong))
    (shelf / "broken").mkdir()
    (shelf / "broken" / "transformer.safetensors").write_bytes(b"no LoRA")
    # and what is none: no name, no file of a transformer, a hidden one
    loras.made(shelf / "a name.safetensors")
    loras.made(shelf / "empty" / "vae.safetensors")
    loras.made(shelf / ".hidden.safetensors")
    loras.made(data / "secret.safetensors")
    return data


@pytest.fixture(scope="module")
def url(model: Path, data: Path) -> Iterator[str]:
    port = serving.free_port()
    offered = [serving.served(model), serving.served(model, mode="mxfp4")]
    listener = serving.Listener(serving.app_of(data, offered, shelf=Shelf(data / "adapters")), port)
    yield f"http://127.0.0.1:{port}"
    listener.stop()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    with Client(url) as found:
        yield found


def made(client: Client, **fields: Any) -> Any:
    job = client.submit(**{**SMALL, "seed": 7, **fields})
    video = client.wait(job.id)
    assert video.status == "completed"
    return frames_of(client._http.get(f"/v1/videos/{job.id}/content").content)


def still(client: Client, **fields: Any) -> Any:
    """One frame, exactly: H.264 of the same frames may differ at this size (see `write_mp4`)."""
    asked = {"prompt": "a red seven", "size": "16x16", "num_inference_steps": 4, "seed": 7, **fields}
    answer = client._http.post("/v1/images/generations", json=asked)
    assert answer.status_code == 200, answer.text
    return pixels_of(base64.b64decode(answer.json()["data"][0]["b64_json"]))


def test_they_are_listed(client, data):
    listed = {adapter["id"]: adapter for adapter in client.adapters()}
    assert list(listed) == ["broken", "late", "single", "style", "wrong"]
    assert {id: adapter["transformers"] for id, adapter in listed.items()} == {
        "broken": ["transformer"],
        "late": ["transformer_2"],
        "single": None,
        "style": ["transformer", "transformer_2"],
        "wrong": ["transformer"],
    }
    files = (data / "adapters" / "style").iterdir()
    assert listed["style"]["bytes"] == sum(file.stat().st_size for file in files)
    assert "lora" in client.models()[0]["takes"]


def test_a_file_that_goes_while_they_are_listed(tmp_path, monkeypatch):
    loras.made(tmp_path / "here.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    shelf, found = Shelf(tmp_path), Shelf.found
    assert list(shelf.found()) == ["here"]
    gone: Any = {"gone": {None: tmp_path / "gone.safetensors"}}
    monkeypatch.setattr(Shelf, "found", lambda self: {**found(self), **gone})
    assert [adapter["id"] for adapter in shelf.shown()] == ["here"]


@pytest.mark.parametrize("mode", ["none", "mxfp4"])
def test_switched_from_job_to_job(client, model, data, tmp_path, mode):
    name = "tiny-t2v" if mode == "none" else "tiny-t2v:mxfp4"
    plain, exactly = made(client, model=name), still(client, model=name)
    adapted = made(client, model=name, lora="style")
    weak = made(client, model=name, lora={"name": "style", "scale": 0.25})
    two = made(client, model=name, lora=["late", {"name": "style", "scale": -0.5}])
    assert (still(client, model=name, lora="style") != exactly).any()
    assert (still(client, model=name) == exactly).all()  # one process, one thread, the same numbers
    seen = [plain, adapted, weak, two]
    assert all(apart(a, b) > 0.5 for i, a in enumerate(seen) for b in seen[:i])
    session = Session.open(model, method=None if mode == "none" else mode, dtype=torch.float32)
    shelf = data / "adapters"
    files = [
        LoraFile(shelf / "late" / "transformer_2.safetensors", 1.0, "transformer_2"),
        LoraFile(shelf / "style" / "transformer.safetensors", -0.5, "transformer"),
        LoraFile(shelf / "style" / "transformer_2.safetensors", -0.5, "transformer_2"),
    ]
    request = session.request(prompt="a red seven", size=(16, 16), frames=5, steps=4, seed=7, loras=files)
    session.run(request).save(tmp_path / "own.mp4")
    assert apart(two, frames_of((tmp_path / "own.mp4").read_bytes())) < 1


def test_what_was_asked_for_is_kept(client):
    asked = {"name": "style", "scale": 0.5}
    video = client.submit(**SMALL, lora=[asked, "late"])
    assert video.parameters["lora"] == [asked, {"name": "late", "scale": 1.0}]
    video = client.wait(video.id)
    assert video.parameters["lora"] == [asked, {"name": "late", "scale": 1.0}]
    assert client.submit(**SMALL).parameters.get("lora") is None
    image = client._http.post("/v1/images/generations", json={"prompt": "a", "size": "16x16", "lora": "style"})
    assert image.status_code == 200, image.text
    assert client.get(image.json()["data"][0]["id"]).parameters["lora"] == [{"name": "style", "scale": 1.0}]


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown name": (
        "stile",
        "lora: no such adapter; got 'stile'; expected broken or late or single or style or wrong",
    ),
    "a path": ("../secret", "no such adapter"),
    "a path with the suffix": ("../secret.safetensors", "no such adapter"),
    "a whole path": ("/etc/passwd", "no such adapter"),
    "a path inside": ("style/transformer", "no such adapter"),
    "a zero byte": ("style\0", "no such adapter"),
    "a hidden one": (".hidden", "no such adapter"),
    "dots": ("..", "no such adapter"),
    "vLLM-Omni's path": ({"name": "style", "path": "/data/x"}, "no such key of an adapter; got 'path'"),
    "a scale of infinity": ({"name": "style", "scale": float("inf")}, "scale"),
    "a scale of NaN": ({"name": "style", "scale": float("nan")}, "scale"),
    "a huge scale": ({"name": "style", "scale": 1e9}, "expected -100 to 100"),
    "a scale of text": ({"name": "style", "scale": "1"}, "scale"),
    "a boolean": ({"name": "style", "scale": True}, "scale"),
    "no name": ({"scale": 1.0}, "no name of an adapter"),
    "a number": ([5], "no name of an adapter"),
    "too many": (["style"] * (COUNT + 1), f"at most {COUNT}"),
    "one for a single transformer": (
        "single",
        "for another transformer than the model has; got single, for the only one",
    ),
    "another model's": ("wrong", "wrong/transformer.safetensors: blocks.2."),
    "a damaged file": ("broken", "broken/transformer.safetensors: not a safetensors file"),
}


@pytest.mark.parametrize("given, said", REFUSED.values(), ids=REFUSED.keys())
def test_refused_when_the_request_comes(client, data, given, said):
    before = len(client.list(100))
    answer = client._http.post(
        "/v1/videos", content=json.dumps({**SMALL, "lora": given}), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "lora" and said in error["message"] and str(data) not in error["message"]
    assert len(client.list(100)) == before


def test_what_is_gone_fails_its_job_alone(client, data, tmp_path):
    """Between the request and the run the files went, or became others."""
    shelf = data / "adapters"
    for how, said in (("gone", "no such adapter"), ("other", "module that the model does not have")):
        loras.made(shelf / how / "transformer.safetensors", seed=4)
        busy = client.submit(**{**SMALL, "num_inference_steps": 200})
        waiting = client.submit(**SMALL, lora=how)
        if how == "gone":
            shutil.rmtree(shelf / how)
        else:
            shutil.copy(shelf / "wrong" / "transformer.safetensors", shelf / how / "transformer.safetensors")
        after = client.submit(**SMALL, lora="style")
        client.cancel(busy.id)
        failed = ended(client._http, waiting.id)
        assert failed["status"] == "failed" and said in failed["error"]["message"]
        assert failed["error"]["code"] == "failed" and str(data) not in failed["error"]["message"]
        assert client.wait(after.id).status == "completed" and failed["attempts"] == 1


def test_the_command(monkeypatch, capsys, url, tmp_path):
    code, out, err = mxdit_command(monkeypatch, capsys, "client", "adapters", "--url", url)
    assert code == 0 and "style" in out and "transformer_2" in out, err
    args = ("client", "submit", "a red seven", "--size", "16x16", "--frames", 5, "--steps", 2, "--json", "--url", url)
    code, out, err = mxdit_command(monkeypatch, capsys, *args, "--lora", "style:0.5", "--lora", "late")
    assert code == 0 and '"scale": 0.5' in out and '"late"' in out, err
    code, out, err = mxdit_command(monkeypatch, capsys, *args, "--lora", "style:much")
    assert code == 2 and "--lora" in err and "no number" in err
    code, out, err = mxdit_command(monkeypatch, capsys, *args, "--lora", "stile")
    assert code == 2 and "no such adapter" in err


def test_through_an_engine(model, url, tmp_path):
    """`mxdit serve` as an engine takes names of its own; another kind of engine is not asked."""
    engines, jobs = Engines([url]), Jobs(tmp_path / "jobs.sqlite")
    app = make_app(engines, jobs, Dispatcher(jobs, Files(tmp_path), [EngineRunner(url, engines)]))
    port = serving.free_port()
    listener = serving.Listener(app, port)
    with Client(f"http://127.0.0.1:{port}") as client:
        serving.wait_for(lambda: client.models())
        assert client.wait(client.submit(**SMALL, lora={"name": "style", "scale": 0.5}).id).status == "completed"
        assert client.adapters() == []
        engines.answered(url, [{"id": "theirs"}])  # as vLLM-Omni tells a model
        with pytest.raises(ServerError, match="the engine takes no adapters by name; got style"):
            client.submit(**SMALL, model="theirs", lora="style")
    listener.stop()


def test_a_server_without_a_folder_has_none(model, tmp_path):
    with serving.client(tmp_path, [serving.served(model)]) as client:
        assert client.get("/v1/adapters").json() == {"object": "list", "data": []}
        answer = client.post("/v1/videos", json={**SMALL, "lora": "style"})
        assert answer.status_code == 400 and "the server has no adapters" in answer.json()["error"]["message"]
