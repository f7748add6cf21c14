"""`layer_methods`: two methods in one expert, from a config to files and to what its layers compute."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import nn

import layouts
import mxdit
import original
import tiny
from command import mxdit_command
from mxdit import MXConfig, MXLinear
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.errors import CheckpointError, ConfigError, InputError
from mxdit.quantize.report import report_of

pytestmark = pytest.mark.slow

FIRST = ["blocks.0.*"]
MIXTURES: dict[str, dict[str, Any]] = {
    "eight bits in a block": {"quant_method": "mxfp4", "layer_methods": {"mxfp8": FIRST}},
    "all three": {
        "quant_method": "mxfp4_dualscale",
        "layer_methods": {"mxfp8": FIRST, "mxfp4": ["*.1.ffn.*"]},
        "num_bf16_fallback_layers": 0,
        "ignored_layers": ["blocks.0.attn2.to_out.0"],
    },
    "four bits in a block": {
        "quant_method": "mxfp8",
        "layer_methods": {"mxfp4": FIRST},
        "mxfp4_scale_alg": 0,
        "w4a8_fallback_layers": ["blocks.0.ffn.net.2"],
    },
}
MIXED = MIXTURES["eight bits in a block"]
mixtures = pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)


def meta(**overrides: Any) -> nn.Module:
    with torch.device("meta"):
        return tiny.transformer(**overrides)


def layers(model: nn.Module) -> dict[str, MXLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, MXLinear)}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def wanted(path: str, config: dict[str, Any]) -> str | None:
    """The method of a linear, read off the mixtures above by hand."""
    if not path.startswith("blocks.") or path in config.get("ignored_layers", ()):
        return None
    if path.startswith("blocks.0."):
        return "mxfp4" if config["quant_method"] == "mxfp8" else "mxfp8"
    return "mxfp4" if ".ffn." in path and config["quant_method"] == "mxfp4_dualscale" else config["quant_method"]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert in BF16."""
    directory = tmp_path_factory.mktemp("expert") / "bf16"
    tiny.transformer().bfloat16().save_pretrained(directory)
    return directory


# -- the key -----------------------------------------------------------------------------------------------------------


@mixtures
def test_json_and_back(config):
    read = MXConfig.from_dict(config)
    assert MXConfig.from_dict(json.loads(json.dumps(read.to_dict()))) == read and hash(read) == hash(read)
    assert read.methods == (config["quant_method"], *read.layer_methods)


def test_methods_have_one_order_and_an_empty_one_is_none():
    one = MXConfig("mxfp4_dualscale", layer_methods={"mxfp8": ("a",), "mxfp4": ("b",)})
    other = MXConfig.from_dict(
        {"quant_method": "mxfp4_dualscale", "layer_methods": {"mxfp4": ["b"], "mxfp4_dualscale": [], "mxfp8": ["a"]}}
    )
    assert one == other and one.to_dict() == other.to_dict() and list(one.layer_methods) == ["mxfp4", "mxfp8"]
    assert MXConfig("mxfp4", layer_methods={"mxfp8": ()}) == MXConfig("mxfp4")
    assert "layer_methods" not in MXConfig("mxfp4").to_dict()


def test_keys_of_a_method_may_be_those_of_an_exception():
    config = MXConfig("mxfp8", layer_methods={"mxfp4": ("a",)})
    assert config.mxfp4_scale_alg == 2 and config.rule_of("mxfp4") == "uos" and config.rule_of("mxfp8") is None
    stored = {"is_checkpoint_serialized": True, "require_smooth_scale": True}
    assert MXConfig("mxfp8", layer_methods={"mxfp4_dualscale": ("a",)}, **stored).require_smooth_scale
    steps = {"mxfp4": [0], "bf16": [1]}  # for those that take them
    assert MXConfig("mxfp8", layer_methods={"mxfp4": ("a",)}, activation_steps=steps).activation_steps


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"layer_methods": ["blocks.0.*"]}, r"layer_methods is no object of methods and layers"),
    "a path": ({"layer_methods": {"mxfp8": "blocks.0.*"}}, r"layer_methods mxfp8 is no list of layer paths"),
    "no method": ({"layer_methods": {"mxfp6": ["a"]}}, r"unknown method in layer_methods; got 'mxfp6'.*'mxfp8'"),
    "bf16": ({"layer_methods": {"bf16": ["a"]}}, r"unknown method in layer_methods; got 'bf16'"),
    "the main one": ({"layer_methods": {"mxfp4": ["a"]}}, r"names the method that all other layers have; got 'mxfp4'"),
    "the main one's activation": (
        {"quant_method": "mxfp8", "layer_methods": {"mxfp4": ["a"]}, "activation": "mxfp4"},
        r"activations in 'mxfp4' do not go with weights in 'mxfp8'",
    ),
    "a rule of neither": (
        {"quant_method": "mxfp8", "layer_methods": {"mxfp4_dualscale": ["a"]}, "mxfp4_scale_alg": 0},
        r"mxfp4_scale_alg is set for a method whose scale rule is fixed.*layer_methods",
    ),
    "a near name": ({"layer_method": {"mxfp8": ["a"]}}, r"unknown key; got 'layer_method'.*'layer_methods'"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_key_does_not_take(keys, message):
    with pytest.raises(ConfigError, match=message):
        MXConfig.from_dict({"quant_method": "mxfp4", **keys})


# -- the plan ----------------------------------------------------------------------------------------------------------


@mixtures
def test_each_linear_gets_its_method_and_that_methods_activation(config):
    own = {
        "mxfp4": ("w4a4", "mxfp4"),
        "mxfp4_dualscale": ("w4a4", "mxfp4"),
        "mxfp8": ("w8a8", "mxfp8"),
        None: (None,) * 2,
    }
    for path, decision in mxdit.plan(meta(), config).items():
        method = wanted(path, config)
        raised = path in config.get("w4a8_fallback_layers", ())
        assert decision.method == method, path
        assert (decision.scheme, decision.activation) == (("w4a8", "mxfp8") if raised else own[method]), path


@pytest.mark.parametrize(
    ("activation", "main", "four", "eight"), [("mxfp8", "w4a8", "w4a4", "w8a8"), ("bf16", "w4a16", "w4a16", "w8a16")]
)
def test_an_activation_is_for_the_main_method_unless_it_is_none_at_all(activation, main, four, eight):
    config = {
        **MIXTURES["all three"],
        "activation": activation,
        "w4a8_fallback_layers": ["blocks.1.ffn.net.2", "blocks.0.ffn.*"],
    }
    decided = {path: str(decision) for path, decision in mxdit.plan(meta(), config).items()}
    assert decided["blocks.1.attn1.to_q"] == main and decided["blocks.1.ffn.net.0.proj"] == four
    assert decided["blocks.0.attn1.to_q"] == eight
    assert decided["blocks.1.ffn.net.2"] == "w4a8" and decided["blocks.0.ffn.net.2"] == "w8a8"


def test_what_is_kept_is_kept_but_by_default_only_of_the_main_method():
    def kept(**keys: Any) -> set[int]:
        config = MXConfig("mxfp4_dualscale", layer_methods={"mxfp8": ("blocks.[0-2].*",)}, **keys)
        decided = mxdit.plan(meta(num_layers=30), config)
        return {int(path.split(".")[1]) for path, of in decided.items() if path.startswith("blocks.") and not of.scheme}

    assert kept() == {3, 4}  # of five
    assert kept(num_bf16_fallback_layers=2) == {0, 1} and kept(num_bf16_fallback_layers=0) == set()
    assert kept(ignored_layers=("blocks.2.*",)) == {2, 3, 4}


PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "two methods": (
        {"layer_methods": {"mxfp8": FIRST, "mxfp4_dualscale": ["*.to_q"]}},
        r"layer_methods: a layer has two methods; got 'blocks.0.attn1.to_q' under 'mxfp4_dualscale' and 'mxfp8'",
    ),
    "nothing": ({"layer_methods": {"mxfp8": ["blocks.9.*"]}}, r"layer_methods mxfp8 'blocks.9.\*': the pattern matches nothing"),
    "no linear": ({"layer_methods": {"mxfp8": ["blocks.0"]}}, r"matches no such layer.*'blocks.0.\*'"),
    "kept": (
        {"layer_methods": {"mxfp8": ["blocks.1.*", "blocks.0.ffn.*"]}, "ignored_layers": FIRST},
        r"mxfp8 'blocks.0.ffn.\*': .*none of them is quantized; got 'blocks.0.ffn.net.0.proj', which stays: ignored_layers",
    ),
    "kept blocks": ({"layer_methods": {"mxfp8": FIRST}, "num_bf16_fallback_layers": 1}, r"stays: num_bf16_fallback_layers: 1"),
    "outside": ({"layer_methods": {"mxfp8": ["proj_out"]}}, r"'proj_out', which stays: outside the blocks"),
    "all": ({"layer_methods": {"mxfp8": ["*"]}}, r"every quantized layer has another method than quant_method; got .*'mxfp4'.*mxfp8"),
    "one of q, k and v": (
        {"layer_methods": {"mxfp8": ["blocks.0.attn1.to_q"]}},
        r"share their input would differ in precision; got blocks.0.attn1.to_q w8a8, blocks.0.attn1.to_k w4a4",
    ),
    "one of q, k and v, in W4A4 like the rest": (
        {"layer_methods": {"mxfp4_dualscale": ["blocks.0.attn1.to_v"]}},
        r"differ in precision; got blocks.0.attn1.to_q mxfp4, .*to_v mxfp4_dualscale.*layer_methods",
    ),
    "an odd number of features": (
        {"layer_methods": {"mxfp4": ["blocks.0.ffn.net.2"]}, "quant_method": "mxfp8"},
        r"ffn.net.2', which stays: odd number of input features",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), PLANS.values(), ids=PLANS)
def test_what_a_model_cannot_have_is_said(keys, message):
    model = meta(ffn_dim=575) if "odd" in message else meta()
    with pytest.raises(ConfigError, match=message):
        mxdit.plan(model, {"quant_method": "mxfp4", **keys})


# -- a model -----------------------------------------------------------------------------------------------------------


@mixtures
def test_a_layer_is_what_it_is_in_an_expert_of_its_method_alone(bf16, config):
    rule = config.get("mxfp4_scale_alg")
    alone: dict[str, dict[str, MXLinear]] = {}
    for method in ("mxfp4", "mxfp4_dualscale", "mxfp8"):
        keys = {"mxfp4_scale_alg": rule} if method == "mxfp4" else {}
        alone[method] = layers(tiny.load(bf16, MXConfig(method, num_bf16_fallback_layers=0, **keys)))
    mixed = tiny.load(bf16, dict(config))
    found = layers(mixed)
    assert set(found) == {path for path in alone["mxfp8"] if wanted(path, config)}
    for path, layer in found.items():
        pure = alone[str(wanted(path, config))][path]
        pure.activation = layer.activation
        assert layer.method == pure.method and layer.rule == pure.rule, path
        assert tiny.same(layer, pure), path
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(layer(x), pure(x)), path
    assert torch.isfinite(tiny.forward(mixed)).all()


@mixtures
def test_in_memory_online_saved_and_streamed_are_one(bf16, tmp_path, config):
    online = tiny.load(bf16, dict(config))
    in_memory = tiny.load(bf16)
    mxdit.quantize_(in_memory, config)
    assert tiny.same(online, in_memory)
    online.save_pretrained(tmp_path / "saved")
    quantize_checkpoint(bf16, tmp_path / "streamed", config).write()
    for name, dtype in (("saved", None), ("streamed", torch.bfloat16)):  # a plain reload changes nothing
        again = tiny.load(tmp_path / name, dtype=dtype)
        assert tiny.same(online, again) and torch.equal(tiny.forward(online), tiny.forward(again))
        assert inspect_checkpoint(tmp_path / name).clean
        assert {p: (x.method, x.activation) for p, x in layers(again).items()} == {
            p: (x.method, x.activation) for p, x in layers(online).items()
        }
    again.save_pretrained(tmp_path / "again")
    stated = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "streamed", "again")]
    configs = [each["quantization_config"] for each in stated]
    assert configs[0] == configs[1] == configs[2]
    # By paths, every one.
    linears = [path for path, module in meta().named_modules() if isinstance(module, nn.Linear)]
    of = {
        method: [p for p in linears if wanted(p, config) == method] for method in ("mxfp4", "mxfp4_dualscale", "mxfp8")
    }
    assert configs[0]["layer_methods"] == {m: paths for m, paths in of.items() if paths and m != config["quant_method"]}
    assert configs[0]["ignored_layers"] == [path for path in linears if wanted(path, config) is None]


def test_a_pipeline_with_a_mixture_of_each_expert(tmp_path):
    tiny.save(tmp_path / "bf16")
    config = mxdit.pipeline_config(
        "mxfp4", layer_methods={"mxfp8": FIRST}, transformer_2={"layer_methods": {"mxfp8": ["*.ffn.*"]}}
    )
    pipe = WanPipeline.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16, quantization_config=config)
    counts = [Counter(layer.method for layer in layers(of).values()) for of in (pipe.transformer, pipe.transformer_2)]
    assert counts == [{"mxfp8": 10, "mxfp4": 10}, {"mxfp8": 4, "mxfp4": 16}]
    pipe.save_pretrained(tmp_path / "mixed")
    again = WanPipeline.from_pretrained(tmp_path / "mixed", torch_dtype=torch.bfloat16)
    assert (tiny.generate(pipe) == tiny.generate(again)).all()


def test_a_reload_says_that_files_keep_their_methods(bf16, tmp_path, caplog):
    quantize_checkpoint(bf16, tmp_path / "mixed", MIXED).write()
    stored = layers(tiny.load(tmp_path / "mixed"))
    for asked, warns in (({"mxfp8": ["*.ffn.*"]}, True), ({}, False)):
        caplog.clear()
        again = tiny.load(tmp_path / "mixed", MXConfig("mxfp4", layer_methods=asked, activation="bf16"))
        assert {p: x.method for p, x in layers(again).items()} == {p: x.method for p, x in stored.items()}
        assert {(x.method, x.activation) for x in layers(again).values()} == {("mxfp4", "bf16"), ("mxfp8", "bf16")}
        assert ("and of their methods" in caplog.text) == warns
    with pytest.raises(ConfigError, match="another method than the one asked for"):
        tiny.load(tmp_path / "mixed", MXConfig("mxfp8"))


@pytest.mark.parametrize("leaf", ["weight", "weight_scale"])
def test_a_file_whose_config_gives_a_layer_the_wrong_method_is_refused(bf16, tmp_path, leaf):
    quantize_checkpoint(bf16, tmp_path / "mixed", MIXED).write()
    layouts.change_json(tmp_path / "mixed" / "config.json", lambda c: c["quantization_config"].pop("layer_methods"))
    with pytest.raises(
        CheckpointError, match=r"mistyped tensor of a mxfp4 layer.*\(64, 64\) uint8; expected \(64, 32\) uint8"
    ):
        tiny.load(tmp_path / "mixed")
    found = inspect_checkpoint(tmp_path / "mixed").components[0]
    assert sum("of a mxfp4 layer" in str(fault) for fault in found.faults) == tiny.LINEARS


# -- activations -------------------------------------------------------------------------------------------------------


def test_activations_are_set_where_they_go(caplog):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, MIXED)
    mxdit.set_activation(model, "mxfp4")
    assert {(x.method, x.activation) for x in layers(model).values()} == {("mxfp4", "mxfp4"), ("mxfp8", "mxfp8")}
    mxdit.set_activation(model, "bf16")
    assert {(x.method, x.activation) for x in layers(model).values()} == {("mxfp4", "bf16"), ("mxfp8", "bf16")}
    recorded = model.config.quantization_config
    assert recorded.activation == "bf16" and recorded.w4a8_fallback_layers == ()
    mxdit.set_activation(model, "mxfp8", ["*.ffn.*"])
    raised = {f"blocks.{block}.ffn.net.{linear}" for block in (0, 1) for linear in ("0.proj", "2")}
    assert set(model.config.quantization_config.w4a8_fallback_layers) == raised
    with pytest.raises(ConfigError, match=r"blocks.0.*activations in 'mxfp4' do not go with weights in 'mxfp8'"):
        mxdit.set_activation(model, "mxfp4", ["*.ffn.*"])
    eight = tiny.transformer().bfloat16()
    mxdit.quantize_(eight, {"quant_method": "mxfp8"})
    with pytest.raises(ConfigError, match="activations in 'mxfp4' do not go with weights in 'mxfp8'"):
        mxdit.set_activation(eight, "mxfp4")


def test_a_saved_copy_has_the_activations_that_were_set_or_a_warning(tmp_path, caplog):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, MIXTURES["four bits in a block"])
    mxdit.set_activation(model, "mxfp8")
    model.save_pretrained(tmp_path / "eight")
    assert {x.activation for x in layers(tiny.load(tmp_path / "eight")).values()} == {"mxfp8"}
    mxdit.set_activation(model, "mxfp4")  # of those that take it: what they have by themselves
    model.save_pretrained(tmp_path / "own")
    assert {(x.method, x.activation) for x in layers(tiny.load(tmp_path / "own")).values()} == {
        ("mxfp4", "mxfp4"),
        ("mxfp8", "mxfp8"),
    }
    with caplog.at_level(logging.WARNING):
        mxdit.set_activation(model, "bf16", ["blocks.1.ffn.*"])
    assert "hold for this run only" in caplog.text


def test_at_a_step_layers_take_what_goes_with_their_weights():
    pipe = tiny.pipeline()
    for model in (pipe.transformer, pipe.transformer_2):
        mxdit.quantize_(model, MIXED)
    seen: list[set[tuple[str, str]]] = []

    def look(model: nn.Module, *_: Any) -> None:
        seen.append({(layer.method, layer.activation) for layer in layers(model).values()})

    with mxdit.step_policy(pipe, {"bf16": [0], "mxfp8": [3]}):
        hooks = [
            of.blocks[0].register_forward_pre_hook(lambda *_, of=of: look(of))
            for of in (pipe.transformer, pipe.transformer_2)
        ]
        tiny.generate(pipe)
    for hook in hooks:
        hook.remove()
    at = [seen[2 * step] for step in range(4)]  # two calls a step, for guidance
    eight = ("mxfp8", "mxfp8")
    assert at == [
        {("mxfp4", "bf16"), ("mxfp8", "bf16")},
        {("mxfp4", "mxfp4"), eight},
        {("mxfp4", "mxfp4"), eight},
        {("mxfp4", "mxfp8"), eight},
    ]


# -- other layouts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade in Wan's own layout, BF16."""
    return original.save(tmp_path_factory.mktemp("wan") / "bf16")


OCP = {**MIXED, "mxfp4_scale_alg": 0}
DUAL = {"quant_method": "mxfp4_dualscale", "layer_methods": {"mxfp8": FIRST}}


@pytest.mark.parametrize("config", [OCP, DUAL], ids=["single", "dual"])
@pytest.mark.parametrize("to", ["sglang", "modelslim"])
def test_there_and_back(released, tmp_path, to, config):
    quantize_checkpoint(released, tmp_path / "packed", config).write()
    convert_checkpoint(tmp_path / "packed", tmp_path / "there", to).write()
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "packed", base=tmp_path / "packed").write()
    packed, back = contents(tmp_path / "packed"), contents(tmp_path / "back")
    assert packed == {name: back[name] for name in packed} and len(packed) == 4
    if to == "sglang":
        found = inspect_checkpoint(tmp_path / "there").components
        assert all(component.linears == {"float": 6, "mxfp8": 10, config["quant_method"]: 10} for component in found)
        reasons = [component.loaders["SGLang 0.5.23"] for component in found]
        assert all(r is None if config is OCP else "dual-scale" in str(r) for r in reasons)


def test_activations_of_both_survive_msmodelslims_description(released, tmp_path):
    """A component whose MXFP4 layers all have MXFP8 activations, or some of them, beside MXFP8 ones."""
    for name, keys in {"all": {"activation": "mxfp8"}, "some": {"w4a8_fallback_layers": ["*.1.ffn.*"]}}.items():
        quantize_checkpoint(released, tmp_path / name, {**OCP, **keys}).write()
        convert_checkpoint(tmp_path / name, tmp_path / f"{name} there", "modelslim").write()
        convert_checkpoint(
            tmp_path / f"{name} there", tmp_path / f"{name} back", "packed", base=tmp_path / name
        ).write()
        stated = [
            json.loads((tmp_path / of / "transformer" / "config.json").read_text())["quantization_config"]
            for of in (name, f"{name} back")
        ]
        for config in stated:  # patterns on one side, their paths on the other
            raised = config.pop("w4a8_fallback_layers", [])
            assert raised == [] or all(".1.ffn." in path for path in raised)
        assert stated[0] == stated[1]


def test_vllm_omni_has_one_method_for_a_transformer(bf16, tmp_path):
    quantize_checkpoint(bf16, tmp_path / "mixed", MIXED).write()
    with pytest.raises(
        InputError, match=r"vllm-omni has one method for a transformer.*mxfp4 and mxfp8.*--fallback-from-base"
    ):
        convert_checkpoint(tmp_path / "mixed", tmp_path / "out", "vllm-omni")
    (found,) = inspect_checkpoint(tmp_path / "mixed").components
    assert "one method" in str(found.loaders["vLLM-Omni 0.30"])
    assert [found.loaders[name] for name in ("diffusers + mxdit", "vLLM-Omni 0.30 with mxdit")] == [None, None]
    convert_checkpoint(tmp_path / "mixed", tmp_path / "out", "vllm-omni", base=bf16, fallback_from_base=True).write()
    (kept,) = inspect_checkpoint(tmp_path / "out").components
    assert kept.linears == {"float": 16, "mxfp4": 10} and kept.loaders["vLLM-Omni 0.30"] is None
    layouts.change_json(
        tmp_path / "out" / "config.json", lambda c: c["quantization_config"].update(layer_methods={"mxfp8": FIRST})
    )
    with pytest.raises(CheckpointError, match="one method for all layers; got layer_methods"):
        inspect_checkpoint(tmp_path / "out")


@mixtures
def test_the_base_gives_the_layers_of_the_rarer_method(bf16, tmp_path, config):
    quantize_checkpoint(bf16, tmp_path / "mixed", {**config, "w4a8_fallback_layers": []}).write()
    convert_checkpoint(tmp_path / "mixed", tmp_path / "out", "packed", base=bf16, fallback_from_base=True).write()
    main = config["quant_method"]
    again, plain = tiny.load(tmp_path / "out", dtype=None), tiny.load(bf16)
    assert {x.method for x in layers(again).values()} == {main}
    held = tiny.load(tmp_path / "mixed", dtype=None)
    for path, module in again.named_modules():
        if isinstance(module, MXLinear):
            assert tiny.same(module, held.get_submodule(path)), path
        elif isinstance(module, nn.Linear):
            assert torch.equal(module.weight, plain.get_parameter(f"{path}.weight")), path


def test_factors_of_eight_bit_layers_have_no_place(released, tmp_path):
    """They could be folded into E4M3 codes only where each block of 32 has one factor, a power of two."""
    quantize_checkpoint(released, tmp_path / "packed", OCP).write()
    folder = tmp_path / "packed" / "transformer"
    name = "blocks.0.ffn.net.2.mul_scale"
    layouts.change(folder, lambda tensors: tensors.update({name: torch.full((576,), 0.5)}))
    with pytest.raises(CheckpointError, match=rf"{name}: mxfp8 is not smoothed.*--fallback-from-base"):
        convert_checkpoint(tmp_path / "packed", tmp_path / "out", "packed")


# -- words -------------------------------------------------------------------------------------------------------------


def test_the_report_counts_methods():
    model = tiny.transformer().bfloat16()
    report = mxdit.quantize_(model, MIXED)
    assert report.methods == {"mxfp8": 10, "mxfp4": 10} == report.to_dict()["methods"]
    assert "20 quantized (10 mxfp8, 10 mxfp4), 6 kept" in str(report)
    assert "blocks.0.ffn.net.2" in str(report) and "mxfp8 w8a8" in str(report) and "mxfp4 w4a4" in str(report)
    assert report_of(model) == report


def test_the_commands_say_it(monkeypatch, capsys, tmp_path):
    tiny.save(tmp_path / "bf16")
    given = ("--method", "mxfp4", "--layer-methods", "blocks.0.*=mxfp8")
    code, out, err = mxdit_command(monkeypatch, capsys, "quantize", tmp_path / "bf16", tmp_path / "mixed", *given)
    assert code == 0 and "linears: 6 float, 10 mxfp8, 10 mxfp4" in out, err
    by_config = ("--config", json.dumps({"layer_methods": MIXED["layer_methods"]}), "--method", "mxfp4")
    assert mxdit_command(monkeypatch, capsys, "quantize", tmp_path / "bf16", tmp_path / "same", *by_config)[0] == 0
    assert contents(tmp_path / "mixed") == contents(tmp_path / "same")
    code, out, _ = mxdit_command(monkeypatch, capsys, "inspect", tmp_path / "mixed")
    assert code == 0 and out.count("linears: 6 float, 10 mxfp8, 10 mxfp4") == 2 and "diffusers + mxdit: loads it" in out
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "mixed")
    assert code == 0 and out.count("10 mxfp8, 10 mxfp4") == 2 and out.count("10 w8a8, 10 w4a4") == 2
    code, out, _ = mxdit_command(monkeypatch, capsys, "info", tmp_path / "mixed", "--json")
    described = json.loads(out)["model"]["experts"]["transformer"]
    assert described["quant_method"] == "mxfp4" and described["methods"] == {"mxfp8": 10, "mxfp4": 10}
    rule = ("--method", "mxfp8", "--layer-methods", "blocks.0.*=mxfp4", "--rule", "ocp", "--dry-run")
    assert mxdit_command(monkeypatch, capsys, "quantize", tmp_path / "bf16", tmp_path / "x", *rule)[0] == 0


@pytest.mark.parametrize("text", ["blocks.0.*", "=mxfp8", "blocks.0.*="])
def test_an_option_that_is_no_layer_and_method(monkeypatch, capsys, tmp_path, text):
    given = ("--method", "mxfp4", "--layer-methods", text)
    code, _, err = mxdit_command(monkeypatch, capsys, "quantize", tmp_path, tmp_path / "x", *given)
    assert code == 2 and "--layer-methods: not layers and their method" in err


def test_a_calibration_starts_from_a_float_model(monkeypatch, capsys, tmp_path):
    """It makes one method; what is stored in two is named."""
    tiny.save(tmp_path / "bf16")
    quantize_checkpoint(tmp_path / "bf16", tmp_path / "mixed", MIXED).write()
    code, _, err = mxdit_command(monkeypatch, capsys, "calibrate", tmp_path / "mixed", tmp_path / "out")
    assert code == 2 and "quantized already" in err and "mxfp4 and mxfp8" in err
    shutil.rmtree(tmp_path / "mixed")
