"""`mxdit quantize`: the tensors that an online load and save_pretrained give, from every source it takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as library
import torch
from diffusers import WanPipeline

import mxdit
import original
import tiny
from command import mxdit_command
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.checkpoint.folders import open_tensors
from mxdit.errors import CheckpointError, MXDiTError

METHODS = ("mxfp4", "mxfp4_dualscale", "mxfp8")
EXPERTS = ("transformer", "transformer_2")
SOURCES = {
    "bf16": {"dtype": torch.bfloat16},
    "fp32": {"dtype": torch.float32},
    "fp32 in shards": {"dtype": torch.float32, "max_shard_size": "150KB"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, options in SOURCES.items():
        made[name] = tmp_path_factory.mktemp("source") / "wan"
        dtype, *_ = options.values()
        pipe = tiny.pipeline(dtype=dtype)
        pipe.save_pretrained(made[name], **{key: value for key, value in options.items() if key != "dtype"})
    return made


@pytest.fixture(scope="module")
def source(sources: dict[str, Path]) -> Path:
    return sources["bf16"]


def assert_same(offline: Path, online: Path, dtype: torch.dtype) -> None:
    """The same tensors, codes and scales bit for bit; and one dtype where diffusers keeps norms and tables in FP32."""
    ours, theirs = open_tensors(offline), open_tensors(online)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        path, _, leaf = name.rpartition(".")
        mine, other = tensor.read(), theirs[name].read()
        if f"{path}.weight_scale" not in ours or leaf == "bias":
            assert mine.dtype is dtype, name
            other = other.to(dtype)
        assert mine.dtype is other.dtype and torch.equal(mine, other), name
    configs = [json.loads((path / "config.json").read_text()) for path in (offline, online)]
    assert configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("method", METHODS)
def test_as_an_online_load_gives(sources, tmp_path, kind, method):
    quantize_checkpoint(sources[kind], tmp_path / "offline", method).write()
    for expert in EXPERTS:
        tiny.load(sources[kind] / expert, mxdit.MXConfig(method)).save_pretrained(tmp_path / "online" / expert)
        assert_same(tmp_path / "offline" / expert, tmp_path / "online" / expert, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_in_another_dtype(sources, tmp_path, method, dtype):
    quantize_checkpoint(sources["fp32"], tmp_path / "offline", method, dtype=dtype).write()
    tiny.load(sources["fp32"] / "transformer", mxdit.MXConfig(method), dtype).save_pretrained(tmp_path / "online")
    assert_same(tmp_path / "offline" / "transformer", tmp_path / "online", dtype)


QKV = [f"blocks.1.attn1.to_{x}" for x in "qkv"]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ignored layers": ("mxfp4", {"ignored_layers": ["blocks.0.*", "blocks.1.ffn.net.0.proj"]}),
    "fallback blocks": ("mxfp4_dualscale", {"num_bf16_fallback_layers": 1}),
    "OCP scales": ("mxfp4", {"mxfp4_scale_alg": 0}),
    "other activations": ("mxfp4", {"activation": "mxfp8"}),
    "other activations in places": ("mxfp4", {"w4a8_fallback_layers": [*QKV, "blocks.*.ffn.net.2"]}),
    "an expert of its own": (
        "mxfp4_dualscale",
        {"ignored_layers": ["blocks.0.*"], "transformer_2": {"quant_method": "mxfp8", "ignored_layers": [*QKV]}},
    ),
    "an expert left float": ("mxfp8", {"transformer": None}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method, overrides", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_config_as_online(source, tmp_path, method, overrides):
    pipe = WanPipeline.from_pretrained(
        source, torch_dtype=torch.bfloat16, quantization_config=mxdit.pipeline_config(method, **overrides)
    )
    pipe.save_pretrained(tmp_path / "online")
    shared = {"quant_method": method, **{k: v for k, v in overrides.items() if k not in EXPERTS}}
    own = {k: None if v is None else {**shared, **v} for k, v in overrides.items() if k in EXPERTS}
    quantize_checkpoint(source, tmp_path / "offline", shared, own).write()
    for expert in EXPERTS:
        assert_same(tmp_path / "offline" / expert, tmp_path / "online" / expert, torch.bfloat16)
    assert inspect_checkpoint(tmp_path / "offline").clean


@pytest.mark.slow
def test_the_pipeline_loads_and_draws_the_same_pixels(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "packed", "mxfp4_dualscale", shard_size=100_000).write()
    offline = WanPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    config = mxdit.pipeline_config("mxfp4_dualscale")
    online = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config)
    assert np.array_equal(tiny.generate(offline), tiny.generate(online))
    plain = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    assert not np.array_equal(tiny.generate(offline), tiny.generate(plain))  # or nothing was quantized


@pytest.mark.parametrize("alone", [True, False])
def test_a_modular_pipeline(source, tmp_path, alone):
    """Its index names parts that lie elsewhere, too, and may stand beside that of a plain pipeline."""
    model, dst = tmp_path / "model", tmp_path / "dst"
    shutil.copytree(source, model)
    index = json.loads((model / "model_index.json").read_text())
    parts = {name: [*of, {"subfolder": name}] for name, of in index.items() if isinstance(of, list)}
    (model / "modular_model_index.json").write_text(json.dumps({"_class_name": "ModularPipeline", **parts}))
    if alone:
        (model / "model_index.json").unlink()
        shutil.rmtree(model / "transformer_2")
    quantize_checkpoint(model, dst, "mxfp4").write()
    inspected = inspect_checkpoint(dst)
    assert inspected.pipeline and inspected.clean
    assert {made.component for made in inspected.components} == ({"transformer"} if alone else set(EXPERTS))
    assert {path.name for path in dst.iterdir()} == {path.name for path in model.iterdir()}
    for path in model.glob("*.json"):
        assert json.loads((dst / path.name).read_text()) == json.loads(path.read_text())


@pytest.mark.parametrize("folder, component", original.EXPERTS.items())
def test_one_expert_of_either_layout(tmp_path, folder, component):
    original.save(tmp_path / "wan")
    original.transformer(component).save_pretrained(tmp_path / "diffusers")
    quantize_checkpoint(tmp_path / "wan" / folder, tmp_path / "a", "mxfp4").write()
    plan = quantize_checkpoint(tmp_path / "diffusers", tmp_path / "b", "mxfp4")
    plan.write()
    assert (tmp_path / "a" / tiny.WEIGHTS).read_bytes() == (tmp_path / "b" / tiny.WEIGHTS).read_bytes()
    assert [planned.component for planned in plan.components] == [""] and not plan.carried
    tiny.load(tmp_path / "diffusers", mxdit.MXConfig("mxfp4")).save_pretrained(tmp_path / "online")
    assert_same(tmp_path / "b", tmp_path / "online", torch.bfloat16)
    assert inspect_checkpoint(tmp_path / "a").clean and tiny.load(tmp_path / "a").config.num_layers == tiny.BLOCKS


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["packed", "vllm-omni", "sglang"])
def test_a_quantized_checkpoint_is_refused(source, tmp_path, to):
    quantize_checkpoint(source, tmp_path / "packed", {"quant_method": "mxfp4", "mxfp4_scale_alg": 0}).write()
    if to != "packed":
        convert_checkpoint(tmp_path / "packed", tmp_path / to, to).write()
    with pytest.raises(CheckpointError, match=f"quantized already; got {to}.*mxdit convert"):
        quantize_checkpoint(tmp_path / to, tmp_path / "again", "mxfp4")
    # and so is one that only says so, or that only is
    shutil.copytree(source / "transformer", tmp_path / "liar")
    for expert in ("liar", f"{to}/transformer"):
        config = json.loads((tmp_path / expert / "config.json").read_text())
        if expert == "liar":
            config["quantization_config"] = {
                "quant_method": "mxfp4",
                "layout": "packed",
                "is_checkpoint_serialized": True,
            }
        else:
            config.pop("quantization_config", None)
        (tmp_path / expert / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            quantize_checkpoint(tmp_path / expert, tmp_path / "again", "mxfp4")
    assert not (tmp_path / "again").exists()


NAN, INF = float("nan"), float("inf")
DAMAGED: dict[str, tuple[str, float, torch.dtype]] = {
    "NaN in a weight": ("blocks.1.attn2.to_v.weight", NAN, torch.bfloat16),
    "inf in a weight": ("blocks.0.ffn.net.0.proj.weight", -INF, torch.bfloat16),
    "NaN in a bias": ("blocks.0.ffn.net.0.proj.bias", NAN, torch.bfloat16),
    "inf in a layer that is kept": ("proj_out.weight", INF, torch.bfloat16),
    "NaN in a norm": ("blocks.1.norm2.weight", NAN, torch.float32),
    "a weight beyond fp16": ("blocks.1.attn1.to_q.weight", 70_000.0, torch.float16),
    "a table beyond fp16": ("scale_shift_table", -1e30, torch.float16),
    "a weight beyond bf16": ("blocks.0.attn1.to_q.weight", 3.4e38, torch.bfloat16),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, value, dtype", DAMAGED.values(), ids=DAMAGED.keys())
def test_infs_and_nans_are_refused_by_name(sources, tmp_path, method, name, value, dtype):
    shutil.copytree(sources["fp32"] / "transformer", tmp_path / "source")
    tensors = library.load_file(tmp_path / "source" / tiny.WEIGHTS)
    tensors[name].view(-1)[-1] = value
    library.save_file(tensors, tmp_path / "source" / tiny.WEIGHTS)
    with pytest.raises(MXDiTError) as caught:
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", method, dtype=dtype).write()
    assert str(caught.value).startswith(f"{name}: ") and "NaNs" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- the command -------------------------------------------------------------------------------------------------------


def command(monkeypatch: Any, capsys: Any, *args: object) -> tuple[int, str, str]:
    return mxdit_command(monkeypatch, capsys, "quantize", *args)


def test_the_command_says_and_does_what_the_function_does(monkeypatch, capsys, source, tmp_path):
    own = {"transformer_2": {"num_bf16_fallback_layers": 0}, "w4a8_fallback_layers": ["blocks.1.ffn.net.2"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    code, out, _ = command(
        monkeypatch, capsys, source, tmp_path / "a", "--method", "mxfp4", "--rule", "ocp", "--num-bf16-fallback-layers", 1,
        "--ignored-layers", "blocks.*.ffn.net.0.proj", "--config", tmp_path / "own.json", "--shard-size", "100kB",
        "--dtype", "fp16", "--copy", "--json",
    )  # fmt: skip
    said = json.loads(out)
    assert code == 0 and said["written"] and said["destination"] == str(tmp_path / "a")
    config = {
        "quant_method": "mxfp4",
        "mxfp4_scale_alg": 0,
        "num_bf16_fallback_layers": 1,
        "ignored_layers": ["blocks.*.ffn.net.0.proj"],
        "w4a8_fallback_layers": ["blocks.1.ffn.net.2"],
    }
    second = {"transformer_2": {**config, "num_bf16_fallback_layers": 0}}
    quantize_checkpoint(source, tmp_path / "b", config, second, dtype=torch.float16, shard_size=100_000).write(
        copy=True
    )
    files = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert "model_index.json" in files and sum("transformer/diffusion_pytorch_model-0000" in name for name in files) > 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).stat().st_nlink == 1
    assert [expert["linears"] for expert in said["experts"]] == [{"float": 17, "mxfp4": 9}, {"float": 8, "mxfp4": 18}]

    code, out, err = command(monkeypatch, capsys, source, tmp_path / "c", "--config", '{"quant_method": "mxfp8"}')
    assert (
        code == 0 and "transformer: linears: 6 float, 20 mxfp8" in out and "MiB written" in out and "error" not in err
    )


BAD: dict[str, tuple[list[Any], str]] = {
    "no method": ([], "no method"),
    "an unknown method": (["--method", "mxpf4"], "mxfp4"),
    "a rule of another method": (["--method", "mxfp8", "--rule", "ocp"], "--rule"),
    "an unknown rule": (["--method", "mxfp4", "--rule", "up"], "uos or ocp"),
    "a size that is none": (["--method", "mxfp4", "--shard-size", "big"], "not a size; got 'big'"),
    "a size of nothing": (["--method", "mxfp4", "--shard-size", "0GiB"], "not a size"),
    "a size too small": (["--method", "mxfp4", "--shard-size", "1kB"], "a shard cannot hold one module"),
    "a dtype that is none": (["--method", "mxfp4", "--dtype", "bf61"], "bf16, fp16, fp32"),
    "a config that is no JSON": (["--method", "mxfp4", "--config", "{"], "not JSON"),
    "an unknown key": (["--method", "mxfp4", "--config", '{"ignored_layer": []}'], "ignored_layers"),
    "two methods": (["--method", "mxfp4", "--config", '{"quant_method": "mxfp8"}'], "two methods at once"),
    "an expert's config that is none": (
        ["--method", "mxfp4", "--config", '{"transformer": 1}'],
        "no config for a component",
    ),
    "a layer with brackets": (["--method", "mxfp4", "--ignored-layers", "*.to_[xy]"], "'*.to_[xy]'"),
    "activations that do not go with it": (["--method", "mxfp8", "--activation", "mxfp4"], "activation"),
}


@pytest.mark.parametrize("args, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, source, tmp_path, args, said):
    code, out, err = command(monkeypatch, capsys, source, tmp_path / "out", *args)
    assert code == 2 and out == "" and not list(tmp_path.iterdir())
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda tmp: tmp / "none", "no such directory"),
    "an impossible path": (lambda tmp: tmp / ("x" * 5000), "no such directory"),
    "an empty directory": (lambda tmp: tmp, "no checkpoint that mxdit knows"),
    "a file": (lambda tmp: Path(__file__), "not a file that mxdit reads"),
}


@pytest.mark.parametrize("place, said", PLACES.values(), ids=PLACES.keys())
def test_a_source_that_is_none(monkeypatch, capsys, tmp_path, place, said):
    code, _, err = command(monkeypatch, capsys, place(tmp_path), tmp_path / "out", "--method", "mxfp4")
    assert code == 2 and err.count("\n") == 1 and said in err and not list(tmp_path.iterdir())
