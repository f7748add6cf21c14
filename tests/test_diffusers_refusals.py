"""What loading refuses, each time by name, with what was found, what was wanted and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, QuantoConfig, WanPipeline
from safetensors.torch import load_file, save_file

import mxdit
import tiny
from mxdit import CheckpointError, ConfigError, ModelError, MXConfig, MXLinear

LAYER = "blocks.1.ffn.net.2"
QKV = [f"blocks.0.attn1.to_{name}" for name in "qkv"]


def edited(directory: Path, target: Path, edit) -> Path:
    """A copy of a single-file checkpoint whose tensors went through `edit`."""
    shutil.copytree(directory, target)
    tensors = load_file(target / tiny.WEIGHTS)
    edit(tensors)
    save_file(tensors, target / tiny.WEIGHTS, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", ["config", "dictionary", "pipeline", "another library's"])
def test_another_method_than_the_checkpoints(source, tmp_path, kind):
    pipe = WanPipeline.from_pretrained(
        source, torch_dtype=torch.bfloat16, quantization_config=mxdit.pipeline_config("mxfp4_dualscale")
    )
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"got '(mxfp8|quanto)' passed.*expected 'mxfp4_dualscale', which its config.json"
    ):
        if kind == "pipeline":
            WanPipeline.from_pretrained(tmp_path, quantization_config=mxdit.pipeline_config("mxfp8"))
        else:
            asked = {
                "config": MXConfig("mxfp8"),
                "dictionary": {"quant_method": "mxfp8"},
                "another library's": QuantoConfig(weights_dtype="int8"),
            }
            tiny.load(tmp_path / "transformer", asked[kind])


def test_storage_is_the_checkpoints_and_activations_are_the_callers(source, tmp_path, caplog):
    tiny.load(source / "transformer", MXConfig("mxfp4")).save_pretrained(tmp_path)
    own_choice = "the checkpoint's own choice of quantized layers is used"
    tiny.load(tmp_path, MXConfig("mxfp4", activation="bf16"))
    assert own_choice not in caplog.text
    asked: Any
    for asked in (
        {"ignored_layers": ("blocks.0.*",)},
        {"num_bf16_fallback_layers": 1},
        {"layer_methods": {"mxfp8": ("blocks.0.*",)}},
    ):
        caplog.clear()
        model = tiny.load(tmp_path, MXConfig("mxfp4", activation="bf16", **asked))
        assert {m.scheme for m in model.modules() if isinstance(m, MXLinear)} == {"w4a16"}
        assert len(mxdit.report_of(model).quantized) == 20
        assert own_choice in caplog.text


def test_a_caller_who_names_no_activation_gets_the_stored_one(source, tmp_path):
    tiny.load(source / "transformer", MXConfig("mxfp4", activation="bf16")).save_pretrained(tmp_path)
    for config in (None, MXConfig("mxfp4")):
        model = tiny.load(tmp_path, config)
        assert {m.scheme for m in model.modules() if isinstance(m, MXLinear)} == {"w4a16"}


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{LAYER}.weight"), f"1 tensor missing from the checkpoint; expected {LAYER}.weight"),
        (drop(f"{LAYER}.weight_scale"), f"missing.*{LAYER}.weight_scale.*ignored_layers"),
        (drop(f"{LAYER}.bias"), f"missing.*{LAYER}.bias.*incomplete"),
        (drop("proj_out.weight"), "missing.*proj_out.weight"),
        (
            put("blocks.7.weight", torch.zeros(1)),
            "1 tensor in the checkpoint that the model has no place for; got blocks.7",
        ),
        (put(f"{LAYER}.weight_dual_scale", torch.ones(64, 2, 1)), "no place for; got blocks.1.ffn.net.2.weight_dual"),
        (
            put(f"{LAYER}.weight_scale", torch.zeros(64, 17, dtype=torch.uint8)),
            r"got \(64, 17\) uint8; expected \(64, 18\) uint8",
        ),
        (put(f"{LAYER}.weight_scale", torch.zeros(64, 18)), r"got \(64, 18\) float32; expected \(64, 18\) uint8"),
        (put(f"{LAYER}.weight", torch.zeros(64, 576).bfloat16()), r"got \(64, 576\) bfloat16;.*is not quantized here"),
        (
            put(f"{LAYER}.weight", torch.zeros(64, 576).to(torch.float8_e4m3fn)),
            "numeric layout.*mxdit convert",
        ),
        (put("proj_out.weight", torch.zeros(64, 65)), r"proj_out.weight: misshapen.*got \(64, 65\)"),
    ],
)
def test_checkpoint_that_is_not_what_the_model_needs(source, tmp_path, edit, message):
    tiny.load(source / "transformer", MXConfig("mxfp4")).save_pretrained(tmp_path / "good")
    with pytest.raises(CheckpointError, match=message):
        tiny.load(edited(tmp_path / "good", tmp_path / "bad", edit))


@pytest.mark.parametrize(
    ("leaf", "at", "value", "message"),
    [
        ("mul_scale", 7, 0.0, "not finite and positive in bf16; got 0.0 at channel 7"),
        ("mul_scale", 0, float("nan"), "not finite and positive in bf16; got nan at channel 0"),
        ("weight_dual_scale", 3, -1.0, "a dual scale is negative or not finite; got -1.0 and 0 more"),
        ("weight_dual_scale", 0, float("inf"), "a dual scale is negative or not finite; got inf"),
    ],
)
def test_small_tensors_are_looked_at_when_they_are_loaded(source, tmp_path, leaf, at, value, message):
    tiny.load(source / "transformer", MXConfig("mxfp4_dualscale")).save_pretrained(tmp_path / "good")

    def edit(tensors):
        tensors[f"{LAYER}.mul_scale"] = torch.ones(576)
        tensors[f"{LAYER}.{leaf}"].view(-1)[at] = value

    with pytest.raises(CheckpointError, match=f"{LAYER}.{leaf}: .*{message}"):
        tiny.load(edited(tmp_path / "good", tmp_path / "bad", edit))


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale"])
def test_mul_scale_is_loaded_where_there_is_one(source, tmp_path, method):
    tiny.load(source / "transformer", MXConfig(method)).save_pretrained(tmp_path / "good")
    scale = torch.rand(576).bfloat16().float() + 0.5
    smooth = tiny.load(edited(tmp_path / "good", tmp_path / "smooth", put(f"{LAYER}.mul_scale", scale)))
    assert smooth.get_submodule(LAYER).mul_scale.dtype == torch.float32
    assert torch.equal(smooth.get_submodule(LAYER).mul_scale, scale)
    assert smooth.get_submodule("blocks.0.ffn.net.2").mul_scale is None
    config = json.loads((tmp_path / "smooth" / "config.json").read_text())
    config["quantization_config"]["require_smooth_scale"] = True
    (tmp_path / "smooth" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"19 tensors missing.*mul_scale"):
        tiny.load(tmp_path / "smooth")


def test_eight_bits_have_no_place_for_factors(source, tmp_path):
    tiny.load(source / "transformer", MXConfig("mxfp8")).save_pretrained(tmp_path / "good")
    folder = edited(tmp_path / "good", tmp_path / "smooth", put(f"{LAYER}.mul_scale", torch.ones(576)))
    with pytest.raises(CheckpointError, match=f"no place for; got {LAYER}.mul_scale"):
        tiny.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("blocks.0.norm2.weight"), "1 tensor missing.*blocks.0.norm2.weight"),
        (drop(f"{LAYER}.weight"), f"1 tensor missing.*{LAYER}.weight"),
        (put("lora.weight", torch.zeros(1)), "no place for; got lora.weight"),
        (put(f"{LAYER}.weight", torch.zeros(64, 64)), r"misshapen.*got \(64, 64\) float32; expected \(64, 576\)"),
    ],
)
def test_float_checkpoint_that_is_not_what_the_model_needs(source, tmp_path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        tiny.load(edited(source / "transformer", tmp_path / "bad", edit), MXConfig("mxfp4"))


def test_what_the_model_itself_lets_pass_is_not_refused(source, tmp_path):
    """Wan2.1 I2V files hold norms that the class has no use for, and says so."""
    extra = put("blocks.0.attn2.norm_added_q.weight", torch.ones(64))
    model = tiny.load(edited(source / "transformer", tmp_path / "extra", extra), MXConfig("mxfp4"))
    assert len(mxdit.report_of(model).quantized) == 20


def test_index_that_promises_what_no_file_holds(source, tmp_path):
    tiny.load(source / "transformer", MXConfig("mxfp4")).save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / f"{tiny.WEIGHTS}.index.json").read_text())
    file = tmp_path / index["weight_map"][f"{LAYER}.weight"]
    tensors = load_file(file)
    del tensors[f"{LAYER}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 tensor missing.*{LAYER}.weight"):
        tiny.load(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{LAYER}.weight_scale"), f"missing.*{LAYER}.weight_scale"),
        (
            put(f"{LAYER}.weight", torch.zeros(64, 64, dtype=torch.uint8)),
            r"misshapen.*got \(64, 64\); expected \(64, 288\)",
        ),
    ],
)
def test_pickled_checkpoint_whose_header_says_nothing(source, tmp_path, edit, message):
    tiny.load(source / "transformer", MXConfig("mxfp4")).save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "diffusion_pytorch_model.bin"
    tensors = torch.load(file)
    edit(tensors)
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        tiny.load(tmp_path)


def test_config_json_that_lost_its_quantization_config(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "lost")
    config = json.loads((stored / "config.json").read_text())
    method = config.pop("quantization_config")["quant_method"]
    (tmp_path / "lost" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantized already: restore the quantization_config"):
        tiny.load(tmp_path / "lost", MXConfig(method))


def test_config_that_calls_a_float_checkpoint_quantized(source):
    with pytest.raises(ConfigError, match=r"says that the checkpoint is quantized, and its config.json does not"):
        tiny.load(source / "transformer", MXConfig("mxfp4", is_checkpoint_serialized=True))


def test_checkpoint_of_a_newer_mxdit(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "newer")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "newer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"unknown version of the layout; got 2; expected 1 to 1. Upgrade mxdit"):
        tiny.load(tmp_path / "newer")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"device_map": {"": "cpu", "blocks.1": "disk"}, "offload_folder": "x"},
            "device_map: .*got 'disk' for blocks.1",
        ),
        ({"dtype": torch.float8_e4m3fn}, "unsupported torch_dtype; got torch.float8_e4m3fn; expected torch.bfloat16"),
    ],
)
def test_unsupported_arguments(source, stored, method, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        tiny.load(source / "transformer", MXConfig(method), **kwargs)
    with pytest.raises(ConfigError, match=message):
        tiny.load(stored, **kwargs)


def test_configs_that_do_not_fit_the_model(source):
    with pytest.raises(ConfigError, match=r"'blocks.9.*': the pattern matches nothing"):
        tiny.load(source / "transformer", MXConfig("mxfp4", ignored_layers=("blocks.9.*",)))
    with pytest.raises(ConfigError, match=r"layers that share their input"):
        tiny.load(source / "transformer", MXConfig("mxfp4", ignored_layers=tuple(QKV[:2])))
    with pytest.raises(ModelError, match=r"got AutoencoderKLWan\. .*supported-models"):
        AutoencoderKLWan.from_pretrained(source / "vae", quantization_config=MXConfig("mxfp4"))


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("mxfp5", {}, "unknown quant_method; got 'mxfp5'.* Did you mean 'mxfp8' or 'mxfp4'"),
        ("mxfp4", {"ignored_layer": []}, "got 'ignored_layer'. Did you mean 'ignored_layers'"),
        ("mxfp4", {"transformer2": {}}, "got 'transformer2'. Did you mean 'transformer_2'"),
        ("mxfp4", {"transformer_2": {"ignored": []}}, "unknown key; got 'ignored'. Did you mean 'ignored_layers'"),
        ("mxfp4", {"transformer": "mxfp8"}, "transformer: no config for a component; got 'mxfp8'"),
        ("mxfp4", {"transformer": None, "transformer_2": None}, "every component is left as it is"),
        ("mxfp4", {"quant_method": "mxfp8"}, "two methods at once; got 'mxfp8'; expected 'mxfp4'"),
        ("mxfp4", {"w4a8_fallback_steps": [-1]}, "are no list of step numbers"),
    ],
)
def test_pipeline_config_refuses(method, overrides, message):
    with pytest.raises(ConfigError, match=message):
        mxdit.pipeline_config(method, **overrides)
