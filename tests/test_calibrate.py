"""`mxdit calibrate` on tiny models of the real classes: what it writes, going on after an interruption, verdicts, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mxdit
import tiny
from command import mxdit_command
from mxdit import cli
from mxdit.calibrate import results as groups
from mxdit.calibrate import run as calibrations
from mxdit.calibrate import settings
from mxdit.calibrate.linears import Calibrated, Recipe
from mxdit.calibrate.settings import PRESETS, Settings
from mxdit.errors import ConfigError, InputError
from mxdit.evals.cache import Cache
from mxdit.evals.metrics.video_metrics import psnr_db
from mxdit.generation.directory import bundled, open_model
from mxdit.generation.recording import transformers_of
from safefiles import contents

pytestmark = pytest.mark.slow

SMALL = ["--size", "16x16", "--frames", "5", "--steps", "4"]
PROMPTS = [f"a {color} seven moving {way}" for color in ("red", "blue") for way in ("left", "right")]
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return tiny.save(root / "t2v")


@pytest.fixture(scope="module", autouse=True)
def few_to_judge_by() -> Iterator[None]:
    """Two clips, not four: what they say of a calibration is not relied on here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "LEAST_HELD", 2)
        yield


def options(model: Path, cache: Path, method: str = "mxfp4_dualscale") -> list[object]:
    prompts = model.parent / "prompts.txt"
    return [*SMALL, "--with", "bias", "--prompts", prompts, "--held", 2, "--cache", cache, "--method", method]


@pytest.fixture
def calibrate(monkeypatch, capsys):
    return lambda *args: mxdit_command(monkeypatch, capsys, "calibrate", *args)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {f"{e}.{name}": t for e in EXPERTS for name, t in load_file(directory / e / tiny.WEIGHTS).items()}


@pytest.fixture(scope="module")
def calibrated(model, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of the balanced preset, and the cache that it is from."""
    root = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [
            "mxdit", "calibrate", str(model), str(root / "made"), "--step-budget", "25%", "--force",
            *map(str, options(model, root / "cache")),
        ])  # fmt: skip
        with pytest.raises(SystemExit, match="0"):
            cli.main()
    return root / "made", root / "cache"


def test_the_checkpoint_is_sound_and_runs_as_it_says(calibrated, monkeypatch, capsys):
    made, _ = calibrated
    code, said, _ = mxdit_command(monkeypatch, capsys, "inspect", made)
    assert code == 0, said
    report = json.loads((made / "calibration.json").read_text())
    session = mxdit.Session.open(made)
    for expert, loaded in transformers_of(session.load()).items():
        config = json.loads((made / expert / "config.json").read_text())["quantization_config"]
        assert config["activation_steps"] == report["activation_steps"] != {}
        quantized = {path: m for path, m in loaded.named_modules() if isinstance(m, mxdit.MXLinear)}
        for path, linear in report["linears"][expert].items():
            assert (path not in quantized) == linear["kept_in_bf16"], path
    assert sum(map(len, report["kept"].values())) > 0
    assert any(name.endswith(".mul_scale") for name in tensors(made))
    assert session.run(session.request(prompt=PROMPTS[0], size=(16, 16), frames=5, steps=4)).frames.shape[0] == 5
    assert "<video" in (made / "calibration.html").read_text()


def test_the_checkpoint_holds_what_was_calibrated(calibrated):
    made, found, biases = tensors(calibrated[0]), 0, 0
    kept = json.loads((calibrated[0] / "calibration.json").read_text())["kept"]
    for file in calibrated[1].glob("*/parts.safetensors"):
        expert = json.loads((file.parent / "key.json").read_text())["key"]["expert"]
        for name, tensor in load_file(file).items():
            if name.rpartition(".")[0] not in kept[expert]:
                assert torch.equal(made[f"{expert}.{name}"], tensor), name
                found += name.endswith(".weight")
                biases += name.endswith(".bias")
    assert found == 2 * tiny.BLOCKS * tiny.LINEARS - sum(map(len, kept.values()))
    assert biases > 0


def psnr_of(*directories: Path) -> float:
    """Of the first of the prompts to judge by, made anew by both directories."""
    frames = []
    for directory in directories:
        session = mxdit.Session.open(directory)
        request = session.request(prompt=PROMPTS[2], seed=2, size=(16, 16), frames=5, steps=4)
        frames.append(session.run(request).frames)
    return psnr_db(*frames)


def test_what_was_judged_is_what_was_written(calibrated, model):
    report = json.loads((calibrated[0] / "calibration.json").read_text())
    assert psnr_of(model, calibrated[0]) == pytest.approx(report["clips_psnr_db"]["calibrated"][0], abs=1e-6)


def test_every_linear_is_at_least_as_near_on_inputs_it_has_not_seen(calibrated):
    report = json.loads((calibrated[0] / "calibration.json").read_text())
    linears = [linear for found in report["linears"].values() for linear in found.values()]
    assert len(linears) == 2 * tiny.BLOCKS * tiny.LINEARS
    assert all(linear["error"] <= linear["online"] for linear in linears)
    assert sum(linear["error"] < 0.9 * linear["online"] for linear in linears) > len(linears) / 2


def test_parameters_in_bf16_stay_within_the_budget(calibrated, model):
    report = json.loads((calibrated[0] / "calibration.json").read_text())
    weights = tensors(model)
    sizes = {
        f"{expert}.{path}": weights[f"{expert}.{path}.weight"].numel()
        for expert, found in report["linears"].items()
        for path in found
    }
    kept = sum(sizes[f"{expert}.{path}"] for expert, paths in report["kept"].items() for path in paths)
    assert 0 < kept <= PRESETS["balanced"].share * sum(sizes.values())


def test_a_killed_run_goes_on_and_comes_to_the_same_bytes(calibrated, model, tmp_path, calibrate, monkeypatch):
    """It is killed while it calibrates the sixth group; clips and five groups are there already."""
    done = 0
    own = groups.calibrate

    def killed(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt  # which the command line makes an exit code of
        return own(*args)

    arguments = [model, tmp_path / "made", "--step-budget", "25%", "--force", *options(model, tmp_path / "cache")]
    monkeypatch.setattr(groups, "calibrate", killed)
    assert calibrate(*arguments)[0] == 130
    assert done == 6 and not (tmp_path / "made").exists()
    again = 0

    def counted(*args: Any) -> Any:
        nonlocal again
        again += 1
        return own(*args)

    monkeypatch.setattr(groups, "calibrate", counted)
    code, _, err = calibrate(*arguments)
    assert code == 0, err
    assert again == 2 * tiny.BLOCKS * 7 - 5  # groups of linears that share an input
    ours, theirs = tensors(tmp_path / "made"), tensors(calibrated[0])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_presets_share_what_was_calibrated(calibrated, model, tmp_path, calibrate, monkeypatch):
    shutil.copytree(calibrated[1], tmp_path / "cache")
    monkeypatch.setattr(groups, "calibrate", lambda *args: pytest.fail("the cache has it"))
    arguments = [model, tmp_path / "made", "--preset", "fast", "--force", "--json", *options(model, tmp_path / "cache")]
    code, out, err = calibrate(*arguments)
    assert code == 0, err
    report = json.loads(out)
    assert report["kept"] == {expert: [] for expert in EXPERTS} and report["activation_steps"] == {}


@pytest.mark.parametrize("method", ("mxfp4", "mxfp8"))
def test_other_methods(model, tmp_path, calibrate, method, monkeypatch, capsys):
    arguments = [
        model,
        tmp_path / "made",
        "--keep",
        "30%",
        "--force",
        *options(model, tmp_path / "cache", method),
        *("--frames", 1, "--steps", 2),
    ]
    code, _, err = calibrate(*arguments)
    assert code == 0, err
    config = json.loads((tmp_path / "made" / EXPERTS[0] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == method
    smoothed = [name for name in tensors(tmp_path / "made") if name.endswith("mul_scale")]
    assert bool(smoothed) == (method == "mxfp4")
    # To another layout and back, without loss.
    for layout, source, destination in (("vllm-omni", "made", "there"), ("packed", "there", "back")):
        arguments = ["convert", tmp_path / source, tmp_path / destination, "--to", layout]
        code, _, err = mxdit_command(monkeypatch, capsys, *arguments)
        assert code == 0, err
    ours, theirs = tensors(tmp_path / "made"), tensors(tmp_path / "back")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_quantize_takes_the_plan_of_a_calibration(calibrated, model, tmp_path, monkeypatch, capsys):
    made = tmp_path / "quantized"
    arguments = ["quantize", model, made, "--method", "mxfp4", "--keep-by-budget", calibrated[0] / "calibration.json"]
    code, _, err = mxdit_command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    report = json.loads((calibrated[0] / "calibration.json").read_text())
    for expert in EXPERTS:
        config = json.loads((made / expert / "config.json").read_text())["quantization_config"]
        assert set(report["kept"][expert]) <= set(config["ignored_layers"])
        assert config["activation_steps"] == report["activation_steps"]


def test_a_rejected_calibration_is_not_written(model, tmp_path, calibrate, monkeypatch):
    def worse(linears: Any, *args: Any) -> dict[str, Calibrated]:
        """Linears as online, and claimed to be better than they are: their codes are shuffled."""
        found = calibrations_calibrate(linears, *args)
        for result in found.values():
            result.parts["weight"] = result.parts["weight"].roll(1, 0)
        return found

    calibrations_calibrate = groups.calibrate
    monkeypatch.setattr(groups, "calibrate", worse)
    arguments = (*options(model, tmp_path / "cache"), "--frames", 1, "--steps", 2)
    code, out, err = calibrate(model, tmp_path / "made", *arguments)
    assert code == 2 and "no better than quantizing online" in err and "REJECT" in out
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "best"], "no such preset"),
        (["--keep", "lots"], "no share"),
        (["--keep", "150%"], "no share"),
        (["--with", "magic"], "no such step"),
        (["--without", "magic"], "no such step"),
        (["--count", "3"], "too few prompts"),
        (["--held", "1"], "too few prompts"),
        (["--activation", "int8"], "no scheme"),
        (["--max-bytes", "1KB"], "--max-bytes: fewer bytes than the quantized weights take"),
        (["--lam", "-1"], "lam is no positive number"),
        (["--max-bytes", "1GiB", "--target", "50%"], "two budgets at once"),
        (["--minutes", "0.001"], "not even one prompt"),
        (["--max-cost", "0.9"], "--max-cost: no time that a budget could be"),
        (["--max-cost", "2", "--times", "mxfp8=2"], "--times: not the time of each format"),
        (["--times", "fast"], "--times: no times"),
        (["--minutes", "nan"], "--minutes: no time"),
        (["--minutes", "-1"], "--minutes: no time"),
        (["--seed", "-1"], "--seed: the seed is out of range"),
        (["--seed", "99999999999999999999"], "--seed: the seed is out of range"),
        (["--method", "mxfp5"], "--method: unknown format"),
        (["--with", "bias", "--without", "bias"], "--without: a step is both taken and left out; got bias"),
        (
            ["--held", "3", "--count", "2"],
            "prompts.txt: too few prompts; got 4, 3 of them to judge by and 2 to learn from",
        ),
        (["--keep", "100%"], "--keep transformer: the budget leaves no linear of a transformer quantized"),
        (["--target", "0"], "--target transformer: the budget leaves no linear of a transformer quantized"),
    ],
)
def test_bad_input_is_one_line(calibrated, model, tmp_path, calibrate, arguments, said):
    code, _, err = calibrate(model, tmp_path / "made", *options(model, calibrated[1]), *arguments)
    assert code == 2 and said in err.splitlines()[-1], err
    assert not (tmp_path / "made").exists()


def test_a_quantized_model_is_refused(calibrated, tmp_path, calibrate):
    code, _, err = calibrate(calibrated[0], tmp_path / "again", "--cache", tmp_path / "cache")
    assert code == 2 and "quantized already" in err


def test_an_existing_destination_is_left_alone(model, tmp_path, calibrate):
    code, _, err = calibrate(model, tmp_path, *options(model, tmp_path / "cache"))
    assert code == 2 and "exists" in err and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("destination", "cache", "said"),
    [
        ("t2v/made", "cache", "the destination lies in the model's directory"),
        ("made", "t2v", "the cache lies in the model's directory"),
        ("made", "t2v/vae/../cache", "the cache lies in the model's directory"),
        ("prompts.txt/made", "cache", "the destination cannot be made; got Not a directory"),
        ("prompts.txt/a/b", "cache", "the destination cannot be made; got Not a directory"),
    ],
)
def test_where_nothing_can_be_written_is_said_at_once(model, tmp_path, calibrate, destination, cache, said):
    """Hours later would be too late, and what is in the model's directory is part of what the cache is found by."""
    copy = shutil.copytree(model.parent, tmp_path / "models")
    before = contents(copy)
    code, _, err = calibrate(copy / "t2v", copy / destination, *options(copy / "t2v", copy / cache))
    assert code == 2 and len(err.splitlines()) == 1 and said in err, err
    assert contents(copy) == before


def test_a_transformer_without_a_step(model, tmp_path, calibrate):
    arguments = [model, tmp_path / "made", *options(model, tmp_path / "cache"), "--steps", "1"]
    code, _, err = calibrate(*arguments)
    assert code == 2 and "--steps transformer_2: no step of a clip is this transformer's; got 1" in err.splitlines()[-1]
    assert not list((tmp_path / "cache").glob("*/parts.safetensors"))  # said before anything is calibrated


def test_image_to_video_needs_first_frames(tmp_path):
    directory = tiny.save(tmp_path / "i2v", "i2v")
    with pytest.raises(InputError, match="no first frames"):
        Settings.choose(open_model(directory), request={}, recipe=Recipe("mxfp4", "mxfp4"), budget=PRESETS["fast"])


def test_the_bundled_models_captions_are_not_those_of_its_evaluation():
    from mxdit.evals.samples import choose_videos

    chosen = Settings.choose(
        open_model(bundled("t2v")), request={}, recipe=Recipe("mxfp4", "mxfp4"), budget=PRESETS["fast"]
    )
    videos, _ = choose_videos(chosen.model, "t2v", seeds=2, options={})
    learned, judged = {r.prompt for r in chosen.fit}, {r.prompt for r in chosen.held}
    assert len(learned) == 64 and len(judged) == 16 and not learned & judged
    assert not {video.request.prompt for video in videos} & (learned | judged)


def test_a_default_list_of_prompts():
    from mxdit.calibrate.prompts import PROMPTS as own

    assert len(set(own)) == 32


def test_a_target_is_reached_with_the_fewest_parameters(calibrated, model, tmp_path, calibrate):
    reports = {}
    for target in ("80%", "40%"):
        arguments = [model, tmp_path / target, "--target", target, "--dry-run", "--force", "--json"]
        code, out, err = calibrate(*arguments, *options(model, calibrated[1]))
        assert code == 0, err
        reports[target] = json.loads(out)
        assert not (tmp_path / target).exists()
    kept = {target: sum(map(len, report["kept"].values())) for target, report in reports.items()}
    assert 0 < kept["80%"] < kept["40%"]


def test_time_buys_eight_bit_activations_which_the_checkpoint_has(
    calibrated, model, tmp_path, calibrate, monkeypatch, capsys
):
    arguments = [
        model,
        tmp_path / "made",
        "--max-cost",
        "1.3",
        "--times",
        "mxfp4=1,mxfp8=1.2,bf16=20",
        "--force",
        "--json",
    ]
    code, out, err = calibrate(*arguments, *options(model, calibrated[1]))
    assert code == 0, err
    report = json.loads(out)
    assert (
        any(report["w4a8"].values())
        and report["curve_of"] == "time"
        and report["curve"][-1][0] == pytest.approx(20, rel=1e-3)
    )
    for name in EXPERTS:
        config = json.loads((tmp_path / "made" / name / "config.json").read_text())["quantization_config"]
        assert config.get("w4a8_fallback_layers", []) == report["w4a8"][name]
    assert psnr_of(model, tmp_path / "made") == pytest.approx(report["clips_psnr_db"]["calibrated"][0], abs=1e-6)
    taken = tmp_path / "online"
    report_file = tmp_path / "made" / "calibration.json"
    code, _, err = mxdit_command(
        monkeypatch, capsys, "quantize", model, taken, "--method", "mxfp4_dualscale", "--keep-by-budget", report_file
    )
    assert code == 0, err
    for name in EXPERTS:
        config = json.loads((taken / name / "config.json").read_text())["quantization_config"]
        assert config.get("w4a8_fallback_layers", []) == report["w4a8"][name]


def test_steps_that_do_not_exist():
    with pytest.raises(ConfigError, match="no such step"):
        Recipe("mxfp4", "mxfp4", steps=("smooth", "magic"))


def test_a_bad_recipe_is_caught(tmp_path):
    """A regression target from two captions fits what it has seen, and spoils clips (docs/calibrating.md)."""
    chosen = Settings.choose(
        open_model(bundled("i2v")),
        count=2,
        held=2,
        request={"frames": 5, "steps": 2},
        recipe=Recipe("mxfp4_dualscale", "mxfp4", steps=("regress", "bias"), lam=0.01),
        budget=PRESETS["fast"],
    )
    outcome = calibrations.Calibration(chosen, Cache(tmp_path / "cache")).run()
    assert not outcome.accepted
