"""Every program of examples/ does what it says, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image
from safetensors import safe_open

import tiny
from mxdit.checkpoint import quantize_checkpoint

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))
COMMANDS = str(Path(sys.executable).parent)  # where `mxdit` is installed


@pytest.fixture
def run(tmp_path):
    """Run a program of examples/ in an empty directory, with the installed `mxdit` on the path; its stdout."""

    def in_a_process(name: str, *args: object) -> str:
        start = [sys.executable] if name.endswith(".py") else []
        done = subprocess.run(
            [*start, EXAMPLES / name, *map(str, args)],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return in_a_process


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "t2v")


def method(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def test_all_of_them_are_run_here_and_listed():
    source, listed = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert len(PROGRAMS) == 6
    for name in PROGRAMS:
        assert f'run("{name}"' in source and f"[{name}]({name})" in listed, name


def test_quickstart(run, tmp_path):
    said = run("quickstart.py")
    assert "40 quantized, 6 kept" in said and "quickstart/clip.gif: 9 frames" in said
    assert method(tmp_path / "quickstart" / "quantized" / "transformer_2") == "mxfp4"
    with Image.open(tmp_path / "quickstart" / "clip.gif") as clip:
        assert clip.n_frames == 9 and clip.size == (64, 64)


def test_make_video(run, tmp_path):
    run("make_video.py")
    with av.open(str(tmp_path / "seven.mp4")) as video:
        assert len(list(video.decode(video=0))) == 17


def test_quantize_and_convert(run, model, tmp_path):
    said = run("quantize_and_convert.sh", model, "out")
    assert said.endswith("clean\n") and "vLLM-Omni 0.30: loads it" in said
    assert method(tmp_path / "out" / "packed" / "transformer") == "mxfp4_dualscale"
    (file,) = (tmp_path / "out" / "vllm-omni" / "transformer").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert str(tensors.get_slice("blocks.0.ffn.net.2.weight").get_dtype()) == "F8_E4M3"


def test_evaluate(run, model, tmp_path):
    quantize_checkpoint(model, tmp_path / "mine", "mxfp4").write()
    (tmp_path / "prompts.txt").write_text("a red seven moving left\n")
    few = ("--seeds", 1, "--steps", 2, "--frames", 5, "--size", "32x32", "--probes", 1, "--metrics", "psnr_db")
    run("evaluate.sh", model, "mine", "prompts.txt", "report", *few)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [mode["name"] for mode in results["modes"]] == ["bf16", "mine"]
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_add_a_family(run, tmp_path):
    said = run("add_a_family.py")
    assert "12 quantized, 5 kept" in said and "family/: saved, loaded again, and the same" in said
    assert method(tmp_path / "family") == "mxfp4"


def test_train_lora(run, tmp_path):
    said = run("train_lora.py", "lora", "--steps", 5, "--clips", 8)
    losses = re.findall(r"(transformer(?:_2)?): loss ([\d.]+) before, ([\d.]+) after", said)
    assert [name for name, _, _ in losses] == ["transformer", "transformer_2"]
    assert all(float(after) < float(before) for _, before, after in losses)
    for name, _, _ in losses:
        with safe_open(tmp_path / "lora" / f"{name}.safetensors", "pt") as tensors:
            assert all(key.startswith("transformer.blocks.") for key in tensors.keys())  # noqa: SIM118 - a file, no mapping
    assert "lora/clip.gif: 17 frames" in said
