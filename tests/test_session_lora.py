"""LoRA beside a session's weights: switched from run to run, and refused before a weight is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import loras
import tiny
from command import mxdit_command
from mxdit.checkpoint import quantize_checkpoint
from mxdit.config.loras import LoraFile
from mxdit.errors import InputError, MXDiTError
from mxdit.generation import adapters
from mxdit.generation.plan import DROP, SWAP, Planner, Policy
from mxdit.generation.recording import transformers_of
from mxdit.generation.session import Session

pytestmark = pytest.mark.slow

SMALL: Any = {"prompt": "a red seven", "size": (16, 16), "frames": 5, "steps": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "wan")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {
        "high": loras.made(root / "high.safetensors"),
        "low": loras.save(root / "low.safetensors", loras.original(loras.layers(seed=1, rank=6), alpha=3.0)),
    }


def frames(session: Session, **fields: Any) -> np.ndarray:
    return session.run(session.request(**SMALL, **fields)).frames


def packed(model: Path, folder: Path) -> Path:
    quantize_checkpoint(model, folder / "packed", "mxfp4").write()
    return folder / "packed"


@pytest.mark.parametrize("how", ["unquantized", "online", "packed", "offloaded"])
def test_switched_from_run_to_run(model, files, tmp_path, how):
    options: dict[str, Any] = {"dtype": torch.float32}
    if how in ("online", "offloaded"):
        options |= {"method": "mxfp8", "offload": how == "offloaded"}
    session = Session.open(packed(model, tmp_path) if how == "packed" else model, **options)
    both = [LoraFile(files["high"], 0.8, "transformer"), LoraFile(files["low"], 1.0, "transformer_2")]
    plain = frames(session)
    first, second = frames(session, loras=both[:1]), frames(session, loras=both[1:])
    together = frames(session, loras=both)
    seen = [plain, first, second, together]
    assert all(not np.array_equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert np.array_equal(frames(session, loras=both[:1]), first)
    assert np.array_equal(frames(session), plain) and np.array_equal(frames(session, loras=[]), plain)
    # a session that has them from the start makes the same
    other = Session.open(session.model.path, **options, loras=both)
    assert np.array_equal(frames(other), together) and np.array_equal(frames(other, loras=()), plain)
    # and so does twice half of one
    half = [LoraFile(files["high"], 0.4, "transformer")] * 2
    assert np.array_equal(frames(session, loras=half), first)


def test_unquantized_it_is_what_diffusers_makes(model, files):
    session = Session.open(model, dtype=torch.float32)
    both = [LoraFile(files["high"], 0.8, "transformer"), LoraFile(files["low"], -1.0, "transformer_2")]
    ours = session.run(session.request(**SMALL, seed=5, loras=both)).frames
    pipe = WanPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.load_lora_weights(str(files["high"]), adapter_name="high")
    pipe.load_lora_weights(str(files["low"]), adapter_name="low", load_into_transformer_2=True)
    pipe.set_adapters(["high", "low"], [0.8, -1.0])
    pipe.set_progress_bar_config(disable=True)
    request = session.request(**SMALL, seed=5)
    theirs = pipe(
        prompt="a red seven", negative_prompt="", height=16, width=16, num_frames=5, num_inference_steps=4,
        guidance_scale=request.guidance, guidance_scale_2=request.guidance_2, output_type="np",
        generator=torch.Generator().manual_seed(5),
    ).frames[0]  # fmt: skip
    assert np.array_equal(ours, (theirs * 255).round().astype(np.uint8))


def test_a_file_written_anew_is_another_one(model, files, tmp_path):
    session = Session.open(model, dtype=torch.float32)
    file = tmp_path / "lora.safetensors"
    made = []
    for seed in (0, 1):
        loras.made(file, seed=seed)
        made.append(frames(session, loras=[LoraFile(file, 1.0, "transformer")]))
    assert not np.array_equal(*made)
    request = session.request(**SMALL, loras=[LoraFile(file, 1.0, "transformer")])
    plain = frames(session)
    file.unlink()
    with pytest.raises(InputError, match=r"lora .*lora.safetensors: the file cannot be read"):
        session.run(request)
    # between the request and the run it became one that does not fit
    loras.save(file, loras.diffusers(loras.layers(tiny.transformer(num_layers=3))))
    with pytest.raises(MXDiTError, match=r"blocks\.2\."):
        session.run(request)
    assert np.array_equal(frames(session), plain)
    os.replace(loras.made(tmp_path / "new.safetensors", seed=1), file)
    assert np.array_equal(frames(session, loras=[LoraFile(file, 1.0, "transformer")]), made[1])


def test_no_more_than_so_many_stay_in_memory(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "KEPT", 1)
    session = Session.open(model, dtype=torch.float32)
    many = [LoraFile(loras.made(tmp_path / f"{n}.safetensors", seed=n), 1.0, "transformer") for n in range(4)]
    seen = [frames(session, loras=[lora]) for lora in many]
    assert len(session.load().transformer.peft_config) == 2  # the one in use, and one more
    assert [np.array_equal(frames(session, loras=[lora]), of) for lora, of in zip(many, seen, strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize("method", [None, "mxfp4"])
@pytest.mark.parametrize("policy", [Policy(), Policy(DROP, SWAP)], ids=["resident", "dropped and swapped"])
def test_beside_a_plan_of_memory(model, files, tmp_path, monkeypatch, method, policy):
    """The same frames however the model is held, the plan counts what the files take, and those out of use are not kept."""
    path = packed(model, tmp_path) if method else model
    both = [LoraFile(files["high"], 0.8, "transformer"), LoraFile(files["low"], 1.0, "transformer_2")]
    plain = Session.open(path)
    expected, without = frames(plain, loras=both), frames(plain)
    assert not np.array_equal(expected, without)
    monkeypatch.setattr(Planner, "policies", lambda _: iter([policy]))
    session = Session.open(path, memory="1TiB", loras=both)
    request = session.request(**SMALL)
    phases, none = session.plan(request).phases, session.plan(session.request(**SMALL, loras=[])).phases
    assert np.array_equal(session.run(request).frames, expected)
    tensors = [t for m in transformers_of(session.load()).values() for n, t in m.named_parameters() if "lora_" in n]
    counted = {phase.weights["LoRA"] for phase in phases}
    assert counted == {sum(t.nbytes for t in tensors)} != {0}
    assert {a.total - b.total for a, b in zip(phases, none, strict=True)} == counted
    assert np.array_equal(frames(session, loras=[]), without)
    assert not any("lora_" in n for m in transformers_of(session.load()).values() for n, _ in m.named_parameters())
    assert np.array_equal(session.run(request).frames, expected)


def test_a_file_that_goes_is_told_under_a_plan_of_memory_too(model, tmp_path):
    session = Session.open(model, memory="1TiB")
    request = session.request(**SMALL, loras=[LoraFile(loras.made(tmp_path / "a.safetensors"), 1.0, "transformer")])
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(InputError, match=r"a.safetensors: the file cannot be read"):
        session.run(request)


def test_a_file_that_changes_while_it_is_loaded(model, tmp_path, monkeypatch):
    """Nothing breaks: it is one of the two, or the other."""
    file, key, looks = loras.made(tmp_path / "a.safetensors"), adapters._key, list[Any]()
    session = Session.open(model, dtype=torch.float32)
    request = session.request(**SMALL, loras=[LoraFile(file, 1.0, "transformer")])
    plain = frames(session)

    def looked(lora: LoraFile) -> tuple[Any, ...]:
        looks.append(found := key(lora))
        if len(looks) == 2:
            os.replace(loras.made(tmp_path / "b.safetensors", seed=1), file)
        return found

    monkeypatch.setattr(adapters, "_key", looked)
    first = session.run(request).frames
    assert not np.array_equal(first, plain) and np.array_equal(session.run(request).frames, first)


REFUSED: dict[str, tuple[Any, str]] = {
    "no transformer": (lambda f: [f], "it is not said which transformer"),
    "another transformer": (lambda f: [LoraFile(f, 1.0, "transformer_3")], "transformer that is not there; got transformer_3"),
    "no file": (lambda f: [LoraFile(f.with_name("none"), 1.0, "transformer")], "none: no such file"),
    "no LoRA": (lambda f: [LoraFile(Path(__file__), 1.0, "transformer")], "not a safetensors file"),
    "another model's": (
        lambda f: [LoraFile(loras.save(f, loras.diffusers(loras.layers(tiny.transformer(num_layers=3)))), 1.0, "transformer")],
        r"blocks\.2\.\S+: the LoRA changes a module that the model does not have",
    ),
}  # fmt: skip


@pytest.mark.parametrize("given, said", REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_a_weight_is_read(model, tmp_path, monkeypatch, given, said):
    file = loras.made(tmp_path / "lora.safetensors")
    session = Session.open(model)
    monkeypatch.setattr("mxdit.generation.loading.load", None)
    for act in (lambda: Session.open(model, loras=given(file)), lambda: session.request(**SMALL, loras=given(file))):
        with pytest.raises(InputError, match=said) as caught:
            act()
        assert caught.value.field == "lora"


def test_the_command(monkeypatch, capsys, model, files, tmp_path):
    args = (
        "generate", model, "--prompt", "a red seven", "--size", "16x16", "--frames", 5, "--steps", 4, "--method", "mxfp4",
        "--dtype", "fp32", "--json", "-o", tmp_path / "a.mp4",
    )  # fmt: skip
    chosen = ("--lora", f"transformer={files['high']}:0.5", "--lora", f"transformer_2={files['low']}")
    code, out, err = mxdit_command(monkeypatch, capsys, *args, *chosen)
    assert code == 0, err
    assert json.loads(out)["request"]["loras"] == [
        {"component": "transformer", "file": str(files["high"]), "scale": 0.5},
        {"component": "transformer_2", "file": str(files["low"]), "scale": 1.0},
    ]
    assert [line.split("LoRA ")[1] for line in err.splitlines() if "LoRA" in line] == [
        f"{files['high']}, scale 0.5",
        f"{files['low']}, scale 1",
    ]
    code, out, err = mxdit_command(monkeypatch, capsys, *args, "--lora", files["high"])
    assert code == 2 and out == "" and "--lora" in err and "which transformer" in err
