"""How a server's models compute: attention, fused ops and compiled blocks, from the command's options to what a worker does."""

from __future__ import annotations

import base64
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import serving
import tiny
from command import mxdit_command
from mxdit.config.attention import AttentionPolicy
from mxdit.generation import compiling
from mxdit.generation.session import Session
from serving import SMALL, Process, ended, pixels_of

pytestmark = pytest.mark.slow

IMAGE: Any = {"prompt": "a red seven", "size": (32, 32), "frames": 1, "steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def client(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chosen = replace(
        serving.served(model, mode="mxfp4"), attention=AttentionPolicy.parse("int8;3=exact;of=4"), fused=True
    )
    missing = AttentionPolicy.parse("exact;blocks.*.attn3=torch")
    offered = [chosen, replace(serving.served(model), name="other", attention=missing)]
    with serving.client(tmp_path_factory.mktemp("data"), offered) as found:
        yield found


def test_an_image_is_the_one_that_a_session_makes_so(client, model):
    fields = {"prompt": "a red seven", "size": "32x32", "num_inference_steps": 4, "seed": 7, "model": "tiny-t2v:mxfp4"}
    answer = client.post("/v1/images/generations", json=fields)
    assert answer.status_code == 200, answer.text
    made = pixels_of(base64.b64decode(answer.json()["data"][0]["b64_json"]))

    def own(**methods: Any) -> np.ndarray:
        session = Session.open(model, dtype=torch.float32, method="mxfp4", **methods)
        return session.run(session.request(**IMAGE)).frames[0].astype(int)

    def apart(pixels: np.ndarray) -> float:
        return float(np.abs(made - pixels).mean())

    # FP32 sums of two processes may differ in a last bit.
    assert apart(own(attention="int8;3=exact;of=4", fused=True)) < apart(own()) / 10
    shown = client.get("/v1/models").json()["data"][0]
    assert {key: shown[key] for key in ("attention", "compile", "fused")} == {
        "attention": "int8;3=exact;of=4",
        "compile": False,
        "fused": True,
    }


def test_a_policy_of_other_steps_is_refused_when_the_request_comes(client):
    answer = client.post("/v1/videos", json={**SMALL, "num_inference_steps": 6, "model": "tiny-t2v:mxfp4"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "attention", answer.text


def test_what_only_a_run_can_tell_fails_its_job_and_no_worker(client):
    job = ended(client, client.post("/v1/videos", json={**SMALL, "model": "other"}).json()["id"])
    assert (job["status"], job["attempts"], job["error"]["code"]) == ("failed", 1, "failed")
    assert "expected an attention layer" in job["error"]["message"]
    job = ended(client, client.post("/v1/videos", json={**SMALL, "model": "tiny-t2v:mxfp4"}).json()["id"])
    assert job["status"] == "completed"


def test_a_worker_opens_a_model_as_it_was_told(model):
    policy = AttentionPolicy.parse("int8;0=exact")
    told = replace(serving.served(model), attention=policy, compile=True, fused=True)
    session = pickle.loads(pickle.dumps(told)).open()
    assert session.attention == {"transformer": policy, "transformer_2": policy}
    assert (session.compile, session.fused) == (True, True)


def test_the_command_compiles_in_its_worker_and_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "compiled"))
    args = ("--compile", "--fused", "--attention", "exact", "--method", "mxfp4")
    server = Process(tmp_path / "data", model, args=args).ready(600)  # three processes import torch's compiler
    shown = server.client.get("/v1/models").json()["data"][0]
    assert (shown["attention"], shown["compile"], shown["fused"]) == ("exact", True, True)
    jobs = [server.client.post("/v1/videos", json={**SMALL, "seed": seed}).json()["id"] for seed in (1, 2)]
    assert [ended(server.client, job)["status"] for job in jobs] == ["completed"] * 2
    os.kill(server.process.pid, 15)
    said = server.process.stderr.read()
    server.kill()
    assert said.count("worker of cpu: compiling WanTransformerBlock, graph 1: this step takes longer") == 1, said


# -- refused before a server listens, by a process that tries ----------------------------------------------------------

REFUSED = {
    "no compiler": (["--compile"], r"--compile: torch.compile does not work here.*needs a C\+\+ compiler"),
    "no clip fits": (["--memory", "100MiB"], "--memory .*tiny: 16x16 and 1 frames do not fit.*at least"),
    "no such layers": (["--attention", "exact;blocks.*.attn3=torch"], "attn3.*matches nothing.*an attention layer"),
}


@pytest.mark.parametrize("options, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_job_could_do(monkeypatch, capsys, tmp_path, model, options, said):
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "compiled"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = mxdit_command(monkeypatch, capsys, "serve", model, *options, "--data", tmp_path / "data")
    assert code == 2 and out == "" and not (tmp_path / "data").exists()
    trying, error, end = err.split("\n")
    assert trying == "trying whether the models run so" and re.search(said, error) and end == ""


def test_a_server_whose_default_size_does_not_fit_is_ready_for_smaller_clips(tmp_path):
    pipeline = tiny.pipeline("t2v")
    for transformer in (pipeline.transformer, pipeline.transformer_2):
        transformer.register_to_config(rope_max_seq_len=64)  # as many positions as the default size has
    pipeline.save_pretrained(tmp_path / "tiny")
    server = Process(tmp_path / "data", tmp_path / "tiny", args=("--memory", "1GiB")).ready()
    refused, made = (
        ended(server.client, server.client.post("/v1/videos", json={**SMALL, **fields}).json()["id"])
        for fields in ({"size": "832x480", "num_frames": 81}, {})
    )
    assert refused["status"] == "failed" and "do not fit" in refused["error"]["message"], refused
    assert made["status"] == "completed"
    server.kill()
