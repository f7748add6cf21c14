"""The command as a user meets it: real (tiny) pipelines, real MP4s, and what happens on bad input."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import mxdit
import tiny
from command import mxdit_command
from mxdit.cli import families
from mxdit.models import SPECS

pytestmark = pytest.mark.slow

SMALL = ["--size", "16x16", "--frames", "5", "--steps", "4"]


@pytest.fixture(scope="module", params=tiny.TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {task: tiny.save(root / task, task) for task in tiny.TASKS}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def read_mp4(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), int(rate)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "mxfp4", "mxfp4_dualscale", "mxfp8"])
def test_generate_in_every_mode(monkeypatch, capsys, tmp_path, models, image, task, method):
    output = tmp_path / "clip.mp4"
    extra = ["--image", image] if task == "i2v" else []
    code, out, _ = mxdit_command(
        monkeypatch, capsys, "generate", models[task], "--prompt", "a red seven", *SMALL, *extra,
        "--method", method, "--fps", 12, "--attention", '{"transformer_2": "exact"}', "-o", output, "--json",
    )  # fmt: skip
    assert code == 0
    figures = json.loads(out)
    frames, rate = read_mp4(output)
    assert frames.shape == (5, 16, 16, 3) and rate == 12
    assert set(figures["experts"]) == {"transformer", "transformer_2"}
    expected = 0 if method == "none" else tiny.LINEARS * tiny.BLOCKS
    assert [expert["quantized"] for expert in figures["experts"].values()] == [expected] * 2
    assert [expert["attention"] for expert in figures["experts"].values()] == [None, {"method": "exact"}]
    assert figures["seconds_per_step"] > 0 and figures["peak_bytes"] > 2**20
    assert [path.name for path in tmp_path.iterdir() if path.name != "first.png"] == [
        "clip.mp4"
    ]  # nothing half-written


def test_what_each_expert_runs_is_said(monkeypatch, capsys, tmp_path, models):
    config = {"transformer_2": {"ignored_layers": ["blocks.0.*"]}}
    code, out, err = mxdit_command(
        monkeypatch, capsys, "generate", models["t2v"], "--prompt", "x", *SMALL, "-o", tmp_path / "a.mp4",
        "--method", "mxfp4", "--activation", "mxfp8", "--config", json.dumps(config),
        "--attention", '{"method": "int8", "steps": {"exact": [0]}, "transformer": "torch"}',
    )  # fmt: skip
    assert code == 0
    assert "transformer: 20 linears mxfp4 w4a8" in err
    assert "transformer_2: 10 linears mxfp4 w4a8" in err
    assert "attention: transformer: torch, transformer_2: int8;0=exact" in err
    assert "s per step" in out and "peak memory" in out


@pytest.mark.slow
def test_a_quantized_directory_runs_as_it_is_stored_and_says_so(monkeypatch, capsys, tmp_path, models):
    session = mxdit.Session.open(models["t2v"], method="mxfp4", components={"transformer_2": None})
    session.load().save_pretrained(tmp_path / "packed")
    args = ["--prompt", "x", *SMALL]
    first, second = tmp_path / "online.mp4", tmp_path / "offline.mp4"
    config = json.dumps({"transformer_2": None})
    code, _, _ = mxdit_command(
        monkeypatch, capsys, "generate", models["t2v"], *args, "-o", first, "--method", "mxfp4",
        "--config", config,
    )  # fmt: skip
    assert code == 0
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", tmp_path / "packed", *args, "-o", second)
    assert code == 0 and "transformer: 20 linears mxfp4 w4a4" in err and "transformer_2: 26 linears unquantized" in err
    assert np.array_equal(read_mp4(first)[0], read_mp4(second)[0])

    # The run-time choice goes on top of what is stored; another method, or none, cannot.
    code, _, err = mxdit_command(
        monkeypatch, capsys, "generate", tmp_path / "packed", *args, "-o", second, "--activation", "bf16"
    )
    assert code == 0 and "transformer: 20 linears mxfp4 w4a16" in err
    for method in ("mxfp8", "none"):
        code, _, err = mxdit_command(
            monkeypatch, capsys, "generate", tmp_path / "packed", *args, "-o", second, "--method", method
        )
        assert code == 2 and err.count("error:") == 1 and "mxfp4" in err

    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "packed", "--json")
    experts = json.loads(out)["model"]["experts"]
    assert code == 0
    assert (experts["transformer"]["quant_method"], experts["transformer"]["schemes"]) == ("mxfp4", {"w4a4": 20})
    assert (experts["transformer_2"]["quant_method"], experts["transformer_2"]["schemes"]) == (None, {})
    assert experts["transformer"]["bytes"] < experts["transformer_2"]["bytes"]


BAD = {
    "a size off the patches": (["--size", "20x16"], "multiple of 16"),
    "a size that is none": (["--size", "big"], "WIDTHxHEIGHT"),
    "frames off the VAE's stride": (["--frames", "6"], "Nearest: 5"),
    "more than the position table": (["--size", "1024x16"], "position table"),
    "no steps": (["--steps", "0"], "at least one step"),
    "an empty prompt": (["--prompt", " "], "the prompt is empty"),
    "an unknown method": (["--method", "mxpf4"], "mxfp4_dualscale"),
    "an unknown dtype": (["--dtype", "bf61"], "bf16"),
    "a device that is not here": (["--device", "npu"], "--device"),
    "options without a method": (["--activation", "bf16"], "error: --method "),
    "an unknown config key": (
        ["--method", "mxfp4", "--config", '{"ignored_layer": []}'],
        "ignored_layers",
    ),
    "a config that is no JSON": (["--config", "{"], "not JSON"),
    "a config file that is not there": (["--config", "none.json"], "none.json"),
    "a layer that is not there": (["--method", "mxfp4", "--ignored-layers", "blocks.7.*"], "matches nothing"),
    "a layer of attention that is not there": (
        ["--attention", "exact;blocks.7.*=torch"],
        "error: --attention layers 'blocks.7.*': the pattern matches nothing; expected an attention layer",
    ),
    "attention of no such transformer": (
        ["--attention", '{"transformer": "exact", "transformer_3": "int8"}'],
        "error: --attention: not a policy of attention; got 'transformer_3'",
    ),
    "attention that is no JSON": (["--attention", "{exact"], "error: --attention: not JSON"),
    "an image that is none": (["--image", __file__], "not a readable image"),
    "an image that is not there": (["--image", "none.png"], "no such file"),
    "a boundary out of range": (["--boundary-ratio", "2"], "0 to 1"),
    "a shift out of range": (["--flow-shift", "0"], "positive"),
    "no frames per second": (["--fps", "0"], "--fps"),
    "a frame rate that no file can have": (["--fps", "3000000000"], "--fps"),
    "a seed out of range": (["--seed", str(10**20)], "--seed"),
    "guidance that is no number": (["--guidance-scale", "nan"], "finite"),
    "a shift that is no number": (["--flow-shift", "nan"], "positive"),
    "a binary config file": (["--config", sys.executable], "neither JSON nor"),
    "two methods": (
        ["--method", "mxfp4", "--config", '{"quant_method": "mxfp8"}'],
        "two methods at once; got 'mxfp8'; expected 'mxfp4'",
    ),
    "every expert left out": (
        ["--method", "mxfp4", "--config", '{"transformer": null, "transformer_2": null}'],
        "every component is left unquantized",
    ),
    "a glob with brackets": (["--method", "mxfp4", "--ignored-layers", "*.to_[xy]"], "'*.to_[xy]'"),
    "an impossible file name": (["-o", "x" * 250 + ".mp4"], "cannot be written"),
    "an output on a file system that takes none": (["-o", "/proc/clip.mp4"], "cannot be written"),
    "an output of another kind": (["-o", "clip.gif"], ".mp4"),
    "an output in no directory": (["-o", "none/clip.mp4"], "does not exist"),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, tmp_path, models, args, said):
    monkeypatch.chdir(tmp_path)
    base = ["generate", models["t2v"], "--prompt", "x", *SMALL, "-o", "clip.mp4"]
    code, out, err = mxdit_command(monkeypatch, capsys, *base, *args)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not list(tmp_path.iterdir())  # nothing written


@pytest.mark.parametrize("directory", ["/none/[/x]", "x" * 5000, "none"])
def test_a_directory_that_is_not_there(monkeypatch, capsys, tmp_path, directory):
    monkeypatch.chdir(tmp_path)
    code, out, err = mxdit_command(monkeypatch, capsys, "generate", directory, "--prompt", "x")
    assert code == 2 and out == "" and err.startswith(f"error: {directory}: no such directory")


@pytest.mark.parametrize("args", [("info",), ("generate", "--prompt", "x")])
def test_a_single_file_is_not_taken_for_nothing(monkeypatch, capsys, tmp_path, args):
    file = tmp_path / "high.gguf"
    file.touch()
    code, out, err = mxdit_command(monkeypatch, capsys, args[0], file, *args[1:])
    assert (
        code == 2
        and out == ""
        and err.startswith(f"error: {file}: a file, not a directory.")
        and "mxdit inspect" in err
    )


@pytest.mark.parametrize(
    "old, new",
    [
        (["--model", "DIR"], "DIR as an argument"),
        (["-m", "DIR"], "DIR as an argument"),
        (["-mDIR"], "DIR as an argument"),
        (["--quantization", "mxfp4"], "--method"),
        (["--quantization=mxfp4"], "--method"),
        (["--quantization-config", "{}"], "--config"),
    ],
)
def test_the_old_name_of_an_option_says_the_new_one(monkeypatch, capsys, tmp_path, old, new):
    monkeypatch.chdir(tmp_path)
    code, out, err = mxdit_command(monkeypatch, capsys, "generate", *old)
    assert (
        code == 2 and out == "" and err.rstrip().endswith(f"expected {new}") and err.startswith(f"error: {old[0][:2]}")
    )


def test_a_value_that_looks_like_an_old_option_is_a_value(monkeypatch, capsys, tmp_path):
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", tmp_path / "none", "--prompt", "-mars at night")
    assert code == 2 and "no such directory" in err


def test_prompts_may_hold_brackets(monkeypatch, capsys, tmp_path, models):
    args = ["--prompt", "a red [/b] seven", *SMALL, "-o", tmp_path / "clip.mp4"]
    code, out, _ = mxdit_command(monkeypatch, capsys, "generate", models["t2v"], *args)
    assert code == 0 and "a red [/b] seven" in out


def test_experts_of_different_methods(monkeypatch, capsys, tmp_path, models):
    own = {"transformer_2": {"quant_method": "mxfp8", "ignored_layers": ["blocks.0.*"]}}
    session = mxdit.Session.open(models["t2v"], method="mxfp4", components=own)
    session.load().save_pretrained(tmp_path / "packed")
    args = ["--prompt", "x", *SMALL, "-o", tmp_path / "clip.mp4", "--activation", "mxfp8"]
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", tmp_path / "packed", *args)
    assert code == 0
    assert "transformer: 20 linears mxfp4 w4a8" in err and "transformer_2: 10 linears mxfp8 w8a8" in err
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "packed", "--json")
    experts = json.loads(out)["model"]["experts"]
    assert [(e["quant_method"], e["schemes"], e["kept"]) for e in experts.values()] == [
        ("mxfp4", {"w4a4": 20}, 6),
        ("mxfp8", {"w8a8": 10}, 16),
    ]
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "packed")
    assert code == 0 and "20 w4a4" in out and "10 w8a8" in out


def test_task_and_model_must_agree(monkeypatch, capsys, tmp_path, models, image):
    base = ["--prompt", "x", *SMALL, "-o", tmp_path / "clip.mp4"]
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", models["t2v"], "--image", image, *base)
    assert code == 2 and "text-to-video model" in err
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", models["i2v"], *base)
    assert code == 2 and "needs a first frame" in err


def test_a_model_without_defaults_needs_a_prompt(monkeypatch, capsys, tmp_path, models):
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", models["t2v"], "-o", tmp_path / "clip.mp4")
    assert code == 2 and "no prompt" in err


def test_damaged_directories(monkeypatch, capsys, tmp_path, models):
    (tmp_path / "empty").mkdir()
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / "empty")
    assert code == 2 and "model_index.json" in err
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / "broken")
    assert code == 2 and "cannot be read" in err
    shutil.copytree(models["t2v"], tmp_path / "bare")
    (tmp_path / "bare" / "transformer" / "config.json").write_text("{}")
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / "bare")
    assert code == 2 and "num_layers" in err
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / "broken")
    assert code == 2 and "NoPipeline" in err and "WanPipeline" in err


@pytest.mark.parametrize("method", ["none", "mxfp4"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights(monkeypatch, capsys, tmp_path, models, method, damage):
    shutil.copytree(models["t2v"], tmp_path / "model")
    weights = tmp_path / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    else:
        weights.unlink()
    args = ["--prompt", "x", *SMALL, "--method", method, "-o", tmp_path / "clip.mp4"]
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", tmp_path / "model", *args)
    assert code == 2 and "transformer_2" in err and "damaged" in err and err.count("error:") == 1
    assert not (tmp_path / "clip.mp4").exists()


def test_info_says_what_is_damaged_in_one_line(monkeypatch, capsys, tmp_path, models):
    tiny.pipeline().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded" / "transformer").glob("*.safetensors"))
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "sharded", "--json")
    assert code == 0 and len(shards) > 2
    total = sum(shard.stat().st_size for shard in shards)
    assert json.loads(out)["model"]["experts"]["transformer"]["bytes"] == total
    shards[1].unlink()
    code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / "sharded")
    assert code == 2 and err.count("error:") == 1 and f"got no {shards[1].name}" in err and "Traceback" not in err

    for name, changes, said in (
        ("class", {"_class_name": "NoTransformer3DModel"}, "does not know this kind of model"),
        ("patch", {"patch_size": None}, "no sizes can be told"),
        ("heads", {"num_attention_heads": 0}, "no model can be built"),
    ):
        shutil.copytree(models["t2v"], tmp_path / name)
        config = tmp_path / name / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        code, _, err = mxdit_command(monkeypatch, capsys, "info", tmp_path / name)
        assert code == 2 and err.count("error:") == 1 and said in err and "Traceback" not in err


def test_info_lists_versions_and_backends(monkeypatch, capsys):
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", "--json")
    figures = json.loads(out)
    assert code == 0 and figures["versions"]["mxdit"] == mxdit.__version__
    assert any(backend["why_not"] is None for backend in figures["backends"])
    code, out, _ = mxdit_command(monkeypatch, capsys, "info")
    assert code == 0 and mxdit.__version__ in out and "usable" in out


def test_info_lists_the_families(monkeypatch, capsys):
    """Three of them; that all can be sized is said by test_supported_models."""
    few = {
        name: SPECS[name] for name in ("WanTransformer3DModel", "FluxTransformer2DModel", "LTXVideoTransformer3DModel")
    }
    unpublished = replace(SPECS["WanTransformer3DModel"], title="Another", published=())
    monkeypatch.setattr(families, "SPECS", few | {"Another": unpublished})
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", "--families", "--json")
    listed = json.loads(out)["families"]
    assert code == 0 and [family["title"] for family in listed] == sorted(
        ("Another", *(spec.title for spec in few.values())), key=str.casefold
    )
    found = {family["title"]: family for family in listed}
    assert found["FLUX.1"]["pipelines"] == {"FluxPipeline": "t2i"} and found["FLUX.1"]["quantized"] == 0.7232
    assert found["Another"]["quantized"] is None
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", "--families")
    assert code == 0 and "FLUX.1" in out and "72.3%" in out and "supported-models.md" in out


def test_activations_by_step(monkeypatch, capsys, tmp_path, models):
    """Asked for on the command line, or stored by `quantize`: the same video, and every command that reads it says so."""
    source, steps = models["t2v"], "0-1,3=mxfp8; 2=bf16"
    written = {"mxfp8": [0, 1, 3], "bf16": [2]}

    def clip(name: str, *args: object) -> tuple[np.ndarray, dict]:
        command = ("generate", *args, "--prompt", "a red seven", *SMALL, "-o", tmp_path / name, "--json")
        code, out, err = mxdit_command(monkeypatch, capsys, *command)
        assert code == 0, err
        said = f"activations by step: {mxdit.StepPolicy.from_dict(written)}"
        assert err.count(said) == (0 if name == "plain.mp4" else 2)
        return read_mp4(tmp_path / name)[0], json.loads(out)

    plain, _ = clip("plain.mp4", source, "--method", "mxfp4")
    online, figures = clip("online.mp4", source, "--method", "mxfp4", "--activation-steps", steps)
    assert figures["request"]["activation_steps"] == written
    assert not np.array_equal(online, plain)

    packed = tmp_path / "packed"
    options = ("--method", "mxfp4", "--activation-steps", f"{steps};of=4")
    code, _, err = mxdit_command(monkeypatch, capsys, "quantize", source, packed, *options)
    assert code == 0, err
    written["of"] = 4
    for name in ("transformer", "transformer_2"):
        config = json.loads((packed / name / "config.json").read_text())["quantization_config"]
        assert config["activation_steps"] == written
    offline, figures = clip("offline.mp4", packed)
    assert np.array_equal(offline, online)
    assert figures["request"]["activation_steps"] is None
    assert [expert["activation_steps"] for expert in figures["experts"].values()] == [written] * 2

    for command in ("inspect", "info"):
        code, out, _ = mxdit_command(monkeypatch, capsys, command, packed)
        assert code == 0 and out.count("activations by step: 0-1,3=mxfp8;2=bf16;of=4") == 2
        code, out, _ = mxdit_command(monkeypatch, capsys, command, packed, "--json")
        found = json.loads(out)
        found = found["experts"] if command == "inspect" else list(found["model"]["experts"].values())
        assert [expert["activation_steps"] for expert in found] == [written] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--activation-steps", "0,1"], "error: --activation-steps: not steps and their activation; got '0,1'"),
        (
            ["--activation-steps", "4=mxfp8"],
            "error: --activation-steps: the policy names a step that the request does not",
        ),
        (
            ["--activation-steps", "0=mxfp8;of=40"],
            "error: --activation-steps: the policy was written for another number",
        ),
        (
            ["--activation-steps", "0=mxfp4", "--method", "mxfp8"],
            "error: --activation-steps: activations in 'mxfp4' do not",
        ),
        (
            ["--activation-steps", "0=bf16", "--method", "none"],
            "error: --activation-steps: activations by step, and no",
        ),
    ],
)
def test_errors_of_activations_by_step_name_the_option(monkeypatch, capsys, tmp_path, models, args, message):
    method = [] if "--method" in args else ["--method", "mxfp4"]
    code, _, err = mxdit_command(
        monkeypatch,
        capsys,
        "generate",
        models["t2v"],
        "--prompt",
        "x",
        *SMALL,
        *method,
        *args,
        "-o",
        tmp_path / "x.mp4",
    )
    assert code == 2 and " ".join(err.split()).startswith(message)
