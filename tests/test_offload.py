"""Weights that come to a device and go back: on the emulated NPU, which refuses whatever mixes two devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import mxdit
import tiny
from command import mxdit_command
from mxdit.backends import native
from mxdit.calibrate import settings
from mxdit.calibrate.experts import linear_at
from mxdit.calibrate.sensitivity import sensitivities
from mxdit.calibrate.walk import Walk
from mxdit.checkpoint.files import read_json
from mxdit.generation import offload
from mxdit.generation.recording import Recorder, repeat, transformers_of
from tiny_families.wan import wan_inputs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("npu")]

REQUEST = {"prompt": "a red seven moving left", "size": (16, 16), "frames": 5, "steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "t2v")


@pytest.fixture(autouse=True)
def by_reference() -> Iterator[None]:
    with native.using("reference"):
        yield


def session_of(model: Path, **more: Any) -> mxdit.Session:
    return mxdit.Session.open(model, dtype=torch.float32, device="npu", **more)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in tensors(module).values()}


def calls_of(session: mxdit.Session) -> list[dict[str, Any]]:
    recorder = Recorder(True)
    with recorder.listening(session.load()):
        session.run(session.request(**REQUEST), on_latents=recorder.on_latents)
    return recorder.calls


# -- a module ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", (None, "mxfp4", "mxfp4_dualscale"))
def test_a_module_comes_and_goes(method):
    model = tiny.transformer().bfloat16()
    if method:
        mxdit.quantize_(model, method)
    block = model.blocks[0]
    before, values = tensors(block), {name: t.clone() for name, t in tensors(block).items()}
    with offload.on(block, "npu"):
        assert devices(block) == {"npu"}
        there = tensors(block)
        with offload.on(block, "npu"):
            assert all(tensor is there[name] for name, tensor in tensors(block).items())
        assert devices(block) == {"npu"}
    after = tensors(block)
    assert devices(block) == {"cpu"} and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in values.items())
    if not method:  # nothing was copied back
        assert all(after[name] is before[name] for name in before)
    assert block.training is False and all(isinstance(p, nn.Parameter) for p in block.parameters())


def test_a_module_goes_back_after_an_error():
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="inside"), offload.on(linear, "npu"):
        raise ValueError("inside")
    assert devices(linear) == {"cpu"}


# -- a session ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tiny.TASKS)
def test_a_clip_is_the_same_and_one_block_is_there_at_a_time(task, tmp_path):
    model = tiny.save(tmp_path / task, task)
    whole, parts = session_of(model), session_of(model, offload=True)
    request = whole.request(**REQUEST, **({"image": Image.new("RGB", (16, 16), "red")} if task == "i2v" else {}))
    expected = whole.run(request)
    pipeline, there = parts.load(), list[int]()
    models = transformers_of(pipeline)
    blocks = [block for transformer in models.values() for block in transformer.get_submodule("blocks").children()]

    def look(*_: Any) -> None:
        there.append(sum("npu" in devices(block) for block in blocks))
        assert devices(pipeline.text_encoder) == {"cpu"}

    for block in blocks:
        block.get_submodule("attn1").register_forward_hook(look)
    assert (parts.run(request).frames == expected.frames).all()
    assert set(there) == {1} and len(there) == 2 * 2 * tiny.BLOCKS
    assert all(devices(block) == {"cpu"} for block in blocks)
    for transformer in models.values():
        assert {t.device.type for name, t in tensors(transformer).items() if not name.startswith("blocks.")} == {"npu"}
    with pytest.raises(ValueError, match="in a hook"):
        hook = (
            blocks[0]
            .get_submodule("ffn")
            .register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("in a hook")))
        )
        parts.run(request)
    hook.remove()
    assert all(devices(block) == {"cpu"} for block in blocks)
    assert (parts.run(request).frames == expected.frames).all()


def test_a_walk_is_the_same(model):
    whole, parts = session_of(model), session_of(model, offload=True)
    calls = [call for call in calls_of(whole) if call["expert"] == "transformer"]
    assert len(calls) > 1
    found = []
    for session in (whole, parts):
        transformer, given = transformers_of(session.load())["transformer"], []
        walk = Walk(transformer, calls)
        for _, block, run in walk:
            for _ in run():
                assert devices(block) == {"npu"}
            assert devices(block) == {"npu" if session is whole else "cpu"}
            given += [value.clone() for value in walk._given[-1]]
        found.append([*given, *(repeat(transformer, call).cpu() for call in calls)])
    assert len(found[0]) == len(calls) * (tiny.BLOCKS + 1) and all(map(torch.equal, *found))


def test_a_walk_there_and_back_is_the_same(monkeypatch):
    """The emulated device has no gradients. So the CPU is the device here, and at home weights are on meta, without values."""
    model, values = tiny.transformer(), dict[int, torch.Tensor]()
    inputs = {key: value for key, value in wan_inputs(model).items() if value is not None}
    with torch.no_grad():
        calls = [{"inputs": inputs, "velocity": model(**inputs, return_dict=False)[0]}]
    paths = ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2")
    layers = {
        path: {"quantized": mxdit.MXLinear.from_weight(linear.weight, linear.bias, method="mxfp4")}
        for path, linear in ((path, linear_at(model, path)) for path in paths)
    }
    *_, expected = sensitivities(model, calls, layers)
    for part in model.blocks.modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            home = tensor.detach().to("meta")
            setattr(part, name, nn.Parameter(home) if isinstance(tensor, nn.Parameter) else home)
            values[id(getattr(part, name))] = tensor
    monkeypatch.setattr(offload, "_moved", lambda tensor, _: values[id(tensor)])
    *_, found = sensitivities(model, calls, layers)
    assert found == expected and all(ways["quantized"] > 0 for ways in found.values())
    assert {tensor.device.type for tensor in tensors(model.blocks).values()} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):  # nothing brings the values there by itself
        model(**inputs)


# -- a calibration -----------------------------------------------------------------------------------------------------


def test_a_calibration_writes_the_same_bytes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "LEAST_HELD", 1)  # nobody relies on the verdict
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red seven moving left\na blue seven moving left")
    for name, more in (("whole", []), ("parts", ["--offload"])):
        code, _, said = mxdit_command(
            monkeypatch, capsys, "calibrate", model, tmp_path / name, "--device", "npu", "--dtype", "fp32",
            "--preset", "fast", "--step-budget", "0", "--without", "smooth,gptq,refit", "--prompts", prompts, "--held", 1,
            "--size", "16x16", "--frames", "1", "--steps", "2", "--force", "--cache", tmp_path / f"cache-{name}", *more,
        )  # fmt: skip
        assert code == 0, said
    for expert in ("transformer", "transformer_2"):
        a, b = (tmp_path / name / expert / tiny.WEIGHTS for name in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()
    whole, parts = (read_json(tmp_path / name / "calibration.json") for name in ("whole", "parts"))
    assert whole["linears"] == parts["linears"] and whole["guards"] == parts["guards"]
