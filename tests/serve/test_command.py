"""`mxdit serve` with wrong options: one line, before anything is loaded or written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from command import mxdit_command

KEYS = {"short": "abc\n", "none": "# nothing\n", "foreign": "0123456789abcd\u00e9f\n"}
REFUSED = {
    "beyond this machine without a key": (["--host", "0.0.0.0"], "--host: others would reach the server without a key"),
    "no directory": (["nowhere"], "nowhere: no such directory"),
    "no pipeline": (["."], "no diffusers pipeline directory"),
    "an unknown mode": (["--method", "mxfp4,int8"], "--method: no such mode; got int8"),
    "one model twice": (["bundled", "bundled"], "two models have one name"),
    "no time": (["--keep", "soon"], "--keep: not a time"),
    "no size": (["--max-bytes", "much"], "--max-bytes: not a size"),
    "no device": (["--device", "cuda:9"], "this device cannot be used"),
    "no file of keys": (["--api-key-file", "nowhere"], "nowhere: the file cannot be read"),
    "a short key": (["--api-key-file", "short"], "an API key is too short"),
    "no key": (["--api-key-file", "none"], "no API keys"),
    "a method for an engine": (
        ["--engine", "http://a:1", "--method", "mxfp4"],
        "--method: the engines' models are their own",
    ),
    "a device for an engine": (["--engine", "http://a:1", "--device", "cuda:0"], "--device: the engines' models are"),
    "a type for an engine": (["--engine", "http://a:1", "--dtype", "fp32"], "--dtype: the engines' models are"),
    "attention for an engine": (["--engine", "http://a:1", "--attention", "int8"], "--attention: the engines' models"),
    "compiled blocks of an engine": (["--engine", "http://a:1", "--compile"], "--compile: the engines' models are"),
    "fused ops of an engine": (["--engine", "http://a:1", "--fused"], "--fused: the engines' models are their own"),
    "attention that is none": (["--attention", "int4"], "--attention: unknown method of attention; got 'int4'"),
    "compiled blocks that come and go": (["--compile", "--offload"], "--compile: blocks whose weights come and go"),
    "a plan and weights that come and go": (["--memory", "1GiB", "--offload"], "--offload: a plan of memory decides"),
    "a directory for an engine": (["nowhere", "--engine", "http://a:1"], "the engines' models are their own"),
    "no address of an engine": (["--engine", "a:8091"], "not a server's address; got 'a:8091'"),
    "an engine twice": (["--engine", "http://a:1,http://a:1/v1"], "--engine: an engine is there twice"),
    "no engine": (["--engine", " ,"], "--engine: no engine"),
    "no file with an engine's key": (
        ["--engine", "http://a:1", "--engine-key-file", "x"],
        "--engine-key-file x: the file",
    ),
    "a key that is not ASCII": (["--api-key-file", "foreign"], "not ASCII"),
}


@pytest.mark.parametrize("options, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_said_before_anything_is_made(monkeypatch, capsys, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    for name, text in KEYS.items():
        Path(name).write_text(text)
    code, out, err = mxdit_command(monkeypatch, capsys, "serve", *options, "--data", "data")
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err, err
    assert not Path("data").exists()


def test_a_port_that_is_taken(monkeypatch, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = mxdit_command(monkeypatch, capsys, "serve", "--data", tmp_path / "d", "--port", port)
    assert code == 2 and f"got 127.0.0.1:{port}" in err and "in use" in err
