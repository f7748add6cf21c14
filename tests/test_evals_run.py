"""`mxdit eval` on tiny models of the real classes: every level of its results, resuming, and bad input."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mxdit
import tiny
from command import mxdit_command
from mxdit import AttentionPolicy, Session, cli
from mxdit.errors import InputError
from mxdit.evals import modes
from mxdit.evals import run as evaluations
from mxdit.evals.metrics.definitions import DEFINITIONS
from mxdit.evals.metrics.networks import ADAPTERS
from mxdit.evals.probe import velocity_errors
from mxdit.generation.directory import bundled
from mxdit.generation.recording import Recorder

pytestmark = pytest.mark.slow

SMALL = ["--size", "16x16", "--frames", "5", "--steps", "4", "--metrics", "psnr_db,flicker"]
PROMPTS = "a red seven moving left\n\na blue three moving right\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for task in tiny.TASKS:
        tiny.save(root / task, task)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "first.png")
    (root / "t2v.txt").write_text(PROMPTS)
    (root / "i2v.txt").write_text("a red seven moving left\tfirst.png\n")
    return {task: root / task for task in tiny.TASKS}


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    return mxdit_command(monkeypatch, capsys, "eval", *args)


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The results of all standard modes and one custom mode on a prompt and two seeds, and the cache they are in."""
    root = tmp_path_factory.mktemp("evaluated")
    custom = 'half={"quant_method": "mxfp4", "transformer": {"ignored_layers": ["blocks.0.*"]}}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "mxdit", "eval", str(models["t2v"]), *SMALL, "--prompts", str(models["t2v"].parent / "t2v.txt"), "--count", "1", "--probes", "1",
            "--mode", custom, "--cache", str(root / "cache"), "--json", str(root / "results.json"),
        ])  # fmt: skip
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    return json.loads((root / "results.json").read_text()), root / "cache"


def test_the_results_say_everything_of_every_mode(evaluated):
    results, _ = evaluated
    assert results["schema"] == 1 and results["model"]["task"] == "t2v"
    settings = results["settings"]
    assert (settings["samples"], settings["probe_samples"], settings["seeds"]) == (2, 1, [0, 1])
    assert settings["prompts"] == [PROMPTS.splitlines()[0]]
    assert [mode["name"] for mode in results["modes"]] == [mode.name for mode in modes.STANDARD] + ["half"]
    bf16, *others = results["modes"]
    assert bf16["summary"] == {} and bf16["method"] is None and bf16["how"] == "float"
    assert [step["expert"] for step in bf16["steps"]][0::3] == ["transformer", "transformer_2"]
    for mode in others:
        assert set(mode["summary"]) == set(results["metrics"]) <= set(DEFINITIONS)
        assert mode["weights_bytes"] < bf16["weights_bytes"]
        assert mode["layers_quantized"] + mode["layers_kept"] == bf16["layers_kept"]
        assert len(mode["steps"]) == 4 and len(mode["samples"]) == 2 and len(mode["layers"]) == mode["layers_quantized"]
        for step in mode["steps"]:
            assert step["velocity_error"]["n"] == 1 and step["latent_error"]["n"] == 2
            assert 0 < step["velocity_error"]["mean"] < 1 and step["velocity_error"]["lo"] is None  # of one prompt
            assert 0.5 < step["velocity_cosine"]["mean"] <= 1
        assert 0 < mode["summary"]["accumulated_error"]["mean"] < mode["summary"]["guided_error"]["mean"]
        assert abs(mode["summary"]["slope"]["mean"]) < 0.5 and mode["summary"]["guidance_slope"]["n"] == 1
        worst = [layer["sqnr_db"] for layer in mode["layers"]]
        assert worst == sorted(worst) and worst[0] > 0
        assert mode["summary"]["psnr_db"]["mean"] == pytest.approx(
            np.mean([sample["psnr_db"] for sample in mode["samples"]])
        )
        assert mode["summary"]["latent_error"]["mean"] == pytest.approx(mode["steps"][-1]["latent_error"]["mean"])


def test_offline_is_computed_once_because_it_is_online(evaluated):
    by_name = {mode["name"]: mode for mode in evaluated[0]["modes"]}
    for method in ("mxfp8", "mxfp4_dualscale"):
        online, offline = by_name[f"{method} online"], by_name[f"{method} offline"]
        assert offline["same_as"] == online["name"] and online["same_as"] is None
        assert offline["summary"] == online["summary"] and offline["layers"] == online["layers"]
        assert offline["how"] == "offline" and offline["weights_bytes"] == online["weights_bytes"]
    alone = [mode["name"] for mode in evaluated[0]["modes"] if mode["same_as"] is None]
    assert len(alone) == 8  # activations and rules are other modes, over equal weights or not


def test_more_bits_cost_less(evaluated):
    summary = {mode["name"]: mode["summary"] for mode in evaluated[0]["modes"]}
    for metric, sign in (("sqnr_db", 1), ("velocity_error", -1), ("latent_error", -1)):
        eight, weight_only, four = (
            sign * summary[name][metric]["mean"] for name in ("mxfp8 online", "mxfp4 w4a16 online", "mxfp4 uos online")
        )
        assert eight > weight_only > four


def test_a_second_run_takes_everything_from_the_cache(monkeypatch, capsys, models, evaluated, tmp_path):
    results, cache = evaluated
    before = {path.name for path in cache.iterdir()}

    def never(*_: object) -> None:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(evaluations.Session, "run", never)
    for name in (
        "velocity_errors",
        "layer_errors",
        "capture_layers",
        "video_metrics",
        "quantize_checkpoint",
    ):
        monkeypatch.setattr(evaluations, name, never)
    args = [
        models["t2v"],
        *SMALL,
        "--prompts",
        models["t2v"].parent / "t2v.txt",
        "--count",
        1,
        "--probes",
        1,
        "--cache",
        cache,
    ]
    code, out, err = command(monkeypatch, capsys, *args, "--json", tmp_path / "again.json")
    assert code == 0 and "mxfp4 uos online" in out and "mxfp4 uos online: loading" in err
    again = json.loads((tmp_path / "again.json").read_text())
    for old, new in zip(results["modes"], again["modes"], strict=False):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    assert {path.name for path in cache.iterdir()} == before


def test_an_interrupted_run_goes_on_where_it_was(monkeypatch, capsys, models, tmp_path):
    args = [models["t2v"], *SMALL, "--prompts", models["t2v"].parent / "t2v.txt", "--seeds", 1, "--probes", 1]
    args += ["--modes", "mxfp8 online", "--metrics", "psnr_db", "--cache", tmp_path / "cache"]
    made, real = [], evaluations.Session.run

    def third_fails(session: Any, request: Any, *rest: Any, **more: Any) -> Any:
        made.append(request)
        if len(made) == 3:
            raise InputError("the power went")
        return real(session, request, *rest, **more)

    monkeypatch.setattr(evaluations.Session, "run", third_fails)
    code, _, err = command(monkeypatch, capsys, *args)
    assert code == 2 and "the power went" in err
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]  # nothing half-written
    code, _, _ = command(monkeypatch, capsys, *args)
    assert code == 0 and len(made) == 5  # BF16's two were there; the third again, and the fourth
    # Other settings, or another model, are other entries.
    code, _, _ = command(monkeypatch, capsys, *args, "--steps", 3)
    assert code == 0 and len(made) == 9
    changed = tiny.pipeline("t2v")
    with torch.no_grad():
        changed.transformer_2.blocks[0].attn1.to_q.bias[0] += 1
    changed.save_pretrained(tmp_path / "changed")
    code, _, _ = command(monkeypatch, capsys, tmp_path / "changed", *args[1:])
    assert code == 0 and len(made) == 13


def test_a_mode_of_other_ops_is_another_one_over_equal_weights(monkeypatch, capsys, models, tmp_path):
    args = [models["t2v"], *SMALL, "--prompts", models["t2v"].parent / "t2v.txt", "--count", 1, "--seeds", 1]
    args += ["--dtype", "fp32", "--modes", "bf16", "--cache", tmp_path / "cache", "--json", tmp_path / "r.json"]
    for wrong, said in {
        "exact;attn9=torch": " layers 'attn9': the pattern matches nothing",
        "exact;9=torch": ": the policy names a step that the request does not have",
    }.items():
        code, _, err = command(monkeypatch, capsys, *args, "--mode", f'x={{"attention": "{wrong}"}}')
        assert code == 2 and f"error: --mode x attention{said}" in err and not (tmp_path / "cache").exists()
    code, _, _ = command(
        monkeypatch, capsys, *args, "--mode", 'own={"fused": true, "attention": {"transformer_2": "exact"}}'
    )
    assert code == 0
    plain, own = json.loads((tmp_path / "r.json").read_text())["modes"]
    assert (plain["fused"], own["fused"], own["same_as"]) == (False, True, None)
    assert (plain["attention"], own["attention"]) == ("torch", "transformer: torch, transformer_2: exact")
    assert 0 < own["summary"]["velocity_error"]["mean"] < 1e-5  # the last bits of sums in FP32


def test_parts_that_are_not_quantized_are_seen_when_they_change(monkeypatch, capsys, models, tmp_path):
    """With the same cache, a run over another VAE or scheduler makes its own videos, and its own offline checkpoints."""
    model = tmp_path / "model"
    shutil.copytree(models["t2v"], model)
    args = [model, *SMALL, "--prompts", models["t2v"].parent / "t2v.txt", "--count", 1, "--seeds", 1, "--probes", 1]
    args += ["--modes", "mxfp8", "--cache", tmp_path / "cache", "--json", tmp_path / "r.json"]
    made, real = [], evaluations.Session.run

    def counted(*given: Any, **more: Any) -> Any:
        made.append(given)
        return real(*given, **more)

    monkeypatch.setattr(evaluations.Session, "run", counted)

    def run() -> int:
        """How many videos a run made. Offline equals online, so whatever has changed is in both."""
        made.clear()
        code, _, _ = command(monkeypatch, capsys, *args)
        modes = json.loads((tmp_path / "r.json").read_text())["modes"]
        assert code == 0 and modes[2]["same_as"] == "mxfp8 online"
        return len(made)

    assert (run(), run()) == (2, 0)
    for file, key, value in (
        ("scheduler/scheduler_config.json", "flow_shift", 2.5),
        ("vae/config.json", "latents_mean", None),
    ):
        config = json.loads((model / file).read_text())
        config[key] = value if value is not None else [0.5, *config[key][1:]]
        (model / file).write_text(json.dumps(config))
        assert run() == 2, file
    index = json.loads((model / "model_index.json").read_text())
    assert index["scheduler"][1] == "UniPCMultistepScheduler"
    index["scheduler"][1] = "FlowMatchEulerDiscreteScheduler"
    (model / "model_index.json").write_text(json.dumps(index))
    assert run() == 2


def test_image_to_video_and_a_converted_directory(monkeypatch, capsys, models, tmp_path):
    session = mxdit.Session.open(models["i2v"], method="mxfp4", components={"transformer_2": None})
    session.load().save_pretrained(tmp_path / "packed")
    code, _, _ = command(
        monkeypatch, capsys, models["i2v"], *SMALL, "--prompts", models["i2v"].parent / "i2v.txt", "--modes", "mxfp4 uos*",
        "--mode", f"mine={tmp_path / 'packed'}", "--mode",
        'same={"quant_method": "mxfp4", "transformer_2": null}', "--cache", tmp_path / "cache", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "r.json").read_text())
    _, whole, mine, same = results["modes"]
    assert mine["how"] == "offline" and mine["layers_quantized"] == tiny.LINEARS * tiny.BLOCKS
    assert same["same_as"] == "mine" and same["how"] == "online"
    assert {layer["expert"] for layer in mine["layers"]} == {"transformer"}
    low = [step for step in mine["steps"] if step["expert"] == "transformer_2"]
    assert all(step["velocity_error"]["mean"] == 0 for step in low)  # that expert is BF16, and given BF16's latents
    assert mine["summary"]["velocity_error"]["mean"] < whole["summary"]["velocity_error"]["mean"]


def test_metrics_of_networks_that_users_bring(monkeypatch, capsys, models, tmp_path):
    seen = []

    def measure(weights: Path, pairs: Any, fps: float) -> dict[str, list[float]]:
        """Stands in for networks whose weights cannot be here: what matters is who is compared with whom."""
        clips = [(reference, clip) for reference, clip in pairs]
        seen.append([np.array_equal(*pair) for pair in clips])
        return {"fvd": [2.5]} if weights == tmp_path else {}

    there = replace(ADAPTERS["fvd"], files={}, measure=measure)
    monkeypatch.setattr("mxdit.evals.metrics.networks.ADAPTERS", {"fvd": there, "vbench": there})
    monkeypatch.setattr(evaluations, "ADAPTERS", {"fvd": there, "vbench": there})
    args = [
        models["t2v"],
        *SMALL[:-2],
        "--frames",
        13,
        "--prompts",
        models["t2v"].parent / "t2v.txt",
        "--seeds",
        1,
        "--modes",
        "mxfp8 online",
    ]
    args += [
        "--metrics",
        "fvd,vbench",
        "--weights-dir",
        tmp_path,
        "--cache",
        tmp_path / "cache",
        "--json",
        tmp_path / "r.json",
    ]
    code, _, _ = command(monkeypatch, capsys, *args)
    assert code == 0 and seen == [[True, True], [False, False], [False, False]]  # vbench of BF16; both of the other
    summary = json.loads((tmp_path / "r.json").read_text())["modes"][1]["summary"]
    assert summary["fvd"] == {"mean": 2.5, "lo": None, "hi": None, "n": 2} and "psnr_db" not in summary


def test_the_bundled_model_is_judged(monkeypatch, capsys, tmp_path):
    args = [
        "bundled",
        "--task",
        "i2v",
        "--count",
        1,
        "--seeds",
        1,
        "--steps",
        3,
        "--modes",
        "mxfp8 online",
        "--probes",
        1,
    ]
    args += ["--metrics", "psnr_db", "--cache", tmp_path / "cache", "--json", tmp_path / "r.json"]
    code, out, _ = command(monkeypatch, capsys, *args)
    assert code == 0 and "Digit right" in out
    results = json.loads((tmp_path / "r.json").read_text())
    bf16, mxfp8 = results["modes"]
    assert set(bf16["summary"]) == {"digit", "color", "direction", "background", "first_frame_psnr_db"}
    assert results["model"]["name"] == "mini-I2V" and results["settings"]["steps"] == 3
    for sample in (*bf16["samples"], *mxfp8["samples"]):
        meaning = sample["meaning"]
        assert set(meaning["asked"]) == set(meaning["read"]) == {"digit", "color", "direction", "background"}
        assert sample["color"] == float(meaning["asked"]["color"] == meaning["read"]["color"])
    assert mxfp8["summary"]["velocity_error"]["n"] == 1 and mxfp8["summary"]["psnr_db"]["mean"] > 20


def test_attention_in_int8_costs_the_bundled_model_a_fraction_of_w4a4():
    """At most a tenth of its error power is asked for; in fp32, which adds next to nothing, 0.13 % is seen."""
    path, expert = bundled("t2v"), {"transformer": 1.0, "transformer_2": 1.0}
    plain = Session.open(path, dtype=torch.float32)
    recorder = Recorder(keep_calls=True)
    with recorder.listening(plain.load()):
        request = plain.request(prompt="a blue zero moving right quickly on a black background", steps=2)
        plain.run(request, on_latents=recorder.on_latents)
    assert {call["expert"] for call in recorder.calls} == set(expert)

    def power(session: Session, attention: str) -> float:
        policies = dict.fromkeys(expert, AttentionPolicy(attention))
        steps = velocity_errors(session.load(), recorder.calls, expert, policies)["steps"]
        return sum(step["velocity_error"] ** 2 for step in steps)

    quantized = power(Session.open(path, dtype=torch.float32, method="mxfp4"), "torch")
    assert power(plain, "exact") < 1e-6 * quantized < power(plain, "int8") < 0.002 * quantized


BAD = {
    "no prompts": ([], "--prompts"),
    "a prompts file that is not there": (["--prompts", "none.txt"], "none.txt"),
    "an empty prompts file": (["--prompts", "empty.txt"], "no prompts"),
    "an image for a text model": (["--prompts", "image.txt"], "a prompt alone"),
    "more prompts than there are": (["--prompts", "one.txt", "--count", "2"], "--count"),
    "no seeds": (["--prompts", "one.txt", "--seeds", "0"], "--seeds"),
    "no probes": (["--prompts", "one.txt", "--probes", "0"], "--probes"),
    "an unknown mode": (["--prompts", "one.txt", "--modes", "mxfp5"], "--modes"),
    "an unknown metric": (["--prompts", "one.txt", "--metrics", "psnr"], "--metrics"),
    "a metric without its weights": (["--prompts", "one.txt", "--metrics", "lpips"], "--weights-dir"),
    "an unknown task": (["--prompts", "one.txt", "--task", "v2v"], "--task"),
    "another task": (["--prompts", "one.txt", "--task", "i2v"], "a text-to-video model"),
    "a mode with a pattern that names no layer": (
        ["--prompts", "one.txt", "--mode", 'x={"quant_method": "mxfp4", "ignored_layers": ["block.0.*"]}'],
        "the pattern matches",
    ),
    "a report where a file is": (["--prompts", "one.txt", "--report", "one.txt"], "--report"),
    "too few frames for FVD": (
        ["--prompts", "one.txt", "--seeds", "2", "--metrics", "fvd", "--weights-dir", "weights"],
        "none of them short",
    ),
    "a mode of another model": (["--prompts", "one.txt", "--mode", "x=I2V"], "another model"),
    "a wrong size": (["--prompts", "one.txt", "--size", "20x16"], "multiple of 16"),
    "an output in no directory": (["--prompts", "one.txt", "--json", "none/r.json"], "does not exist"),
    "a cache that cannot be": (["--prompts", "one.txt", "--cache", "one.txt"], "the cache cannot be written"),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, tmp_path, models, args, said):
    monkeypatch.chdir(tmp_path)
    for name, text in {"one.txt": "a red seven\n", "empty.txt": "\n", "image.txt": "a red seven\tfirst.png\n"}.items():
        Path(name).write_text(text)
    Path("weights").mkdir()
    Path("weights/i3d_torchscript.pt").touch()
    base = [models["t2v"], "--size", "16x16", "--frames", "5", "--steps", "2", "--modes", "bf16"]
    args = [part.replace("I2V", str(models["i2v"])) for part in args]
    code, _, err = command(monkeypatch, capsys, *base, *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and said in lines[0] and "Traceback" not in err


def test_a_quantized_model_is_no_reference(monkeypatch, capsys, tmp_path, models):
    mxdit.Session.open(models["t2v"], method="mxfp4").load().save_pretrained(tmp_path / "packed")
    code, _, err = command(
        monkeypatch, capsys, tmp_path / "packed", *SMALL, "--prompts", models["t2v"].parent / "t2v.txt", "--cache",
        tmp_path / "cache",
    )  # fmt: skip
    assert code == 2 and "--mode" in err and "NAME=DIR" in err
