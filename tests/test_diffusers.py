"""The guest in diffusers, with its real classes: quantized while loading, saved, reloaded, all bit for bit."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

import mxdit
import original
import tiny
from mxdit import MXConfig, MXLinear
from processes import output_of

LAYER = "blocks.1.ffn.net.2"


def test_online_equals_quantizing_in_memory(source, method):
    model = tiny.load(source / "transformer")
    mxdit.quantize_(model, method)
    online = tiny.load(source / "transformer", MXConfig(method))
    assert tiny.same(online, model)
    assert online.config.quantization_config == model.config.quantization_config


def test_plain_reload_is_bit_exact(stored, source, method):
    online = tiny.load(source / "transformer", MXConfig(method))
    reloaded = WanTransformer3DModel.from_pretrained(stored)
    assert tiny.same(reloaded, online)
    assert torch.equal(tiny.forward(reloaded), tiny.forward(online))
    assert [layer.scheme for layer in mxdit.report_of(reloaded).layers] == [
        layer.scheme for layer in mxdit.report_of(online).layers
    ]


@pytest.mark.parametrize(("alg", "rule"), [(0, "ocp"), (2, "uos")])
def test_the_scale_rule_is_reloaded(source, tmp_path, alg, rule):
    """Activations are quantized by it at every call, so a reload that forgot it would be another model."""
    online = tiny.load(source / "transformer", MXConfig("mxfp4", mxfp4_scale_alg=alg))
    online.save_pretrained(tmp_path)
    reloaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert {module.rule for module in reloaded.modules() if isinstance(module, MXLinear)} == {rule}
    assert torch.equal(tiny.forward(reloaded), tiny.forward(online))


def test_second_save_equals_the_first(stored, tmp_path):
    WanTransformer3DModel.from_pretrained(stored).save_pretrained(tmp_path)
    assert (tmp_path / tiny.WEIGHTS).read_bytes() == (stored / tiny.WEIGHTS).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, stored)]
    assert configs[0].pop("_name_or_path") != configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sharded_one_tensor_a_file(tmp_path, method, dtype):
    """Weights and biases of a layer arrive from different files, in both directions."""
    floats = tiny.transformer().to(dtype)
    floats.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    floats.save_pretrained(tmp_path / "single")
    files = json.loads((tmp_path / "sharded" / f"{tiny.WEIGHTS}.index.json").read_text())["weight_map"]
    assert files[f"{LAYER}.weight"] != files[f"{LAYER}.bias"]
    online = tiny.load(tmp_path / "sharded", MXConfig(method))
    assert tiny.same(online, tiny.load(tmp_path / "single", MXConfig(method)))
    online.save_pretrained(tmp_path / "quantized", max_shard_size="1KB")
    files = json.loads((tmp_path / "quantized" / f"{tiny.WEIGHTS}.index.json").read_text())["weight_map"]
    assert len({files[f"{LAYER}.{name}"] for name in ("weight", "weight_scale", "bias")}) == 3
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path / "quantized"), online)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", {"blocks.0": "cpu", "": "cpu"}])
def test_device_map(source, stored, method, device_map):
    plain = WanTransformer3DModel.from_pretrained(stored)
    assert tiny.same(tiny.load(source / "transformer", MXConfig(method), device_map=device_map), plain)
    mapped = WanTransformer3DModel.from_pretrained(stored, device_map=device_map)
    assert tiny.same(mapped, plain) and torch.equal(tiny.forward(mapped), tiny.forward(plain))


def test_variant_and_pickle(source, tmp_path, method):
    online = tiny.load(source / "transformer", MXConfig(method))
    online.save_pretrained(tmp_path / "variant", variant="bf16", max_shard_size="100KB")
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path / "variant", variant="bf16"), online)
    online.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert tiny.same(tiny.load(tmp_path / "pickle"), online)


def test_single_file(source, tmp_path, method):
    """A file of the original project or of another tool, quantized while diffusers renames its tensors."""
    weights = load_file(source / "transformer" / tiny.WEIGHTS)
    theirs = original.names(tiny.BLOCKS)
    save_file({theirs[name]: tensor for name, tensor in weights.items()}, tmp_path / "wan.safetensors")
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.safetensors"),
        config=str(source / "transformer"),
        quantization_config=MXConfig(method),
        torch_dtype=torch.bfloat16,
        local_files_only=True,
    )
    assert tiny.same(model, tiny.load(source / "transformer", MXConfig(method)))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_each_expert_has_its_own_config(tmp_path, task):
    tiny.save(tmp_path / "bf16", task)
    config = mxdit.pipeline_config(
        "mxfp4", ignored_layers=["blocks.0.*"], transformer_2={"ignored_layers": ["*.ffn.net.2"], "activation": "mxfp8"}
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16, quantization_config=config)
    pipe.save_pretrained(tmp_path / "quantized")
    again = DiffusionPipeline.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    for name, kept, scheme in (
        ("transformer", "blocks.0.attn1.to_q", "w4a4"),
        ("transformer_2", "blocks.0.ffn.net.2", "w4a8"),
    ):
        expert, reloaded = getattr(pipe, name), getattr(again, name)
        assert tiny.same(reloaded, expert)
        assert type(expert.get_submodule(kept)) is nn.Linear
        assert {m.scheme for m in reloaded.modules() if isinstance(m, MXLinear)} == {scheme}
        stored = json.loads((tmp_path / "quantized" / name / "config.json").read_text())["quantization_config"]
        assert kept in stored["ignored_layers"] and "num_bf16_fallback_layers" not in stored
    # An expert's own key replaces the shared one: it is not added to it.
    assert isinstance(pipe.transformer_2.get_submodule("blocks.0.attn1.to_q"), MXLinear)
    assert (tiny.generate(again) == tiny.generate(pipe)).all()


def test_one_expert_alone(source):
    config = mxdit.pipeline_config("mxfp8", transformer_2=None)
    pipe = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config)
    assert mxdit.report_of(pipe.transformer).quantized and not mxdit.report_of(pipe.transformer_2).quantized


def test_what_quantize_did_is_saved(tmp_path, method):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, method)
    model.save_pretrained(tmp_path)
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path), model)


def test_what_set_activation_did_is_saved(source, tmp_path):
    model = tiny.load(source / "transformer", MXConfig("mxfp4"))
    mxdit.set_activation(model, "mxfp8", layers=["blocks.1.*"])
    model.save_pretrained(tmp_path / "some")
    schemes = {path: m.scheme for path, m in tiny.load(tmp_path / "some").named_modules() if isinstance(m, MXLinear)}
    assert {path for path, scheme in schemes.items() if scheme == "w4a8"} == {
        p for p in schemes if p.startswith("blocks.1")
    }
    mxdit.set_activation(model, "bf16")
    model.save_pretrained(tmp_path / "all")
    assert {m.scheme for m in tiny.load(tmp_path / "all").modules() if isinstance(m, MXLinear)} == {"w4a16"}


def test_report_of_a_load(source, caplog):
    caplog.set_level(logging.INFO, logger="mxdit")
    model = tiny.load(source / "transformer", MXConfig("mxfp4", num_bf16_fallback_layers=1))
    assert model.hf_quantizer.report == mxdit.report_of(
        model, mxdit.plan(model, MXConfig("mxfp4", num_bf16_fallback_layers=1))
    )
    assert {layer.reason for layer in model.hf_quantizer.report.kept} == {
        "num_bf16_fallback_layers: 1",
        "outside the blocks",
    }
    assert "WanTransformer3DModel: 10 linears quantized to mxfp4, 16 kept" in caplog.text


README = """
import numpy
{imports}
pipe = WanPipeline.from_pretrained({directory!r})
print(sum(isinstance(module, mxdit.MXLinear) for module in pipe.transformer_2.modules()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, mxdit\nfrom diffusers import WanPipeline",
        "from diffusers import WanPipeline\nimport mxdit",
        "import diffusers.quantizers.auto\nimport mxdit\nfrom diffusers import WanPipeline",
    ],
)
def test_a_converted_directory_loads_as_the_readme_shows(source, tmp_path, imports):
    config = mxdit.pipeline_config("mxfp4_dualscale")
    WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config).save_pretrained(
        tmp_path
    )
    assert output_of("-c", README.format(imports=imports, directory=str(tmp_path))).strip() == "20"


@pytest.mark.slow
def test_importing_mxdit_imports_no_host_and_leaves_its_modules_as_they_are():
    program = """
import sys, mxdit
from mxdit.integrations.hook import register_when_imported
print(*(name for name in ("diffusers", "transformers", "accelerate", "safetensors") if name in sys.modules))
register_when_imported()
print(sum(type(finder).__module__.startswith("mxdit.") for finder in sys.meta_path))
import diffusers.quantizers.auto as auto, transformers.quantizers.auto, importlib.machinery, inspect
import diffusers.models.attention_dispatch as dispatch
print(sum(type(finder).__module__.startswith("mxdit.") for finder in sys.meta_path))
print(type(auto.__loader__).__name__, type(auto.__spec__.loader).__name__)
print("class DiffusersAutoQuantizer" in inspect.getsource(auto), "mxfp4" in auto.AUTO_QUANTIZER_MAPPING)
print("mxdit" in list(dispatch.AttentionBackendName))
"""
    lines = output_of("-c", program).splitlines()
    assert lines == ["", "3", "0", "SourceFileLoader SourceFileLoader", "True True", "True"]


@pytest.mark.slow
def test_loading_never_holds_a_float_copy(monkeypatch, tmp_path):
    """A checkpoint in FP32, as Wan2.2 is published: online and offline peaks of RssAnon under the limit."""
    out = tmp_path / "rows.json"
    sizes = ["--blocks", "2", "--dim", "1024", "--ffn", "4096", "--shard", "60000000", "--source", "float32"]
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["load_memory.py", *sizes, "--methods", "mxfp4_dualscale", "--json", str(out)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts, one for each row
    assert importlib.import_module("load_memory").main() == 0
    rows = {row["mode"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"bf16", "mxfp4_dualscale online", "mxfp4_dualscale offline"}
    for mode in ("mxfp4_dualscale online", "mxfp4_dualscale offline"):
        row = rows[mode]
        assert row["peak"] <= row["limit"] == int((row["model"] + row["largest"]) * 1.1)
        assert row["limit"] < rows["bf16"]["model"]  # so a copy in BF16 would be over it
