"""Checkpoints from one layout to another and back: the same bytes, whichever way they went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

import layouts
import mxdit
import original
import tiny
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.config.steps import StepPolicy
from mxdit.errors import CheckpointError, InputError
from safefiles import contents
from tiny_families import flux

pytestmark = pytest.mark.slow

QKV = ["attn1.to_q", "attn1.to_k", "attn1.to_v"]
ALONE = "blocks.1.attn2.to_q"  # reads what no other does
KEPT = [f"blocks.0.{name}" for name in (*QKV, "attn2.to_out.0", "ffn.net.2")]
CONFIGS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4", "mxfp4_scale_alg": 0},
    "mxfp8": {"quant_method": "mxfp8"},
    "dual": {"quant_method": "mxfp4_dualscale"},
    "kept": {"quant_method": "mxfp4_dualscale", "ignored_layers": [*KEPT, "blocks.1.attn2.*"]},
}
ONLY_VLLM: dict[str, dict[str, Any]] = {  # what SGLang's layout cannot say
    "uos": {"quant_method": "mxfp4", "mxfp4_scale_alg": 2},
    "w4a8": {"quant_method": "mxfp4", "activation": "mxfp8"},
    "w4a8 in places": {
        "quant_method": "mxfp4",
        "w4a8_fallback_layers": [f"blocks.1.{name}" for name in (*QKV, "ffn.net.0.proj")],
    },
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts as Wan releases them."""
    return original.save(tmp_path_factory.mktemp("wan") / "original")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers pipeline."""
    return tiny.save(tmp_path_factory.mktemp("wan") / "pipeline")


def quantize(source: Path, destination: Path, config: dict[str, Any], *args: Any, **kwargs: Any) -> Path:
    quantize_checkpoint(source, destination, config, *args, **kwargs).write()
    return destination


def convert(source: Path, destination: Path, to: str, **kwargs: Any) -> Path:
    convert_checkpoint(source, destination, to, **kwargs).write()
    return destination


def activations(model: WanTransformer3DModel) -> dict[str, str]:
    return {path: module.activation for path, module in model.named_modules() if isinstance(module, mxdit.MXLinear)}


def by_diffusers(source: Path, destination: Path) -> Path:
    """Wan's own layout to diffusers', by diffusers' converter and its real class."""
    for folder, component in original.EXPERTS.items():
        tensors = {}
        for file in (source / folder).glob("*.safetensors"):
            tensors.update(load_file(file))
        model = WanTransformer3DModel(**original.transformer(component).config)
        model.load_state_dict(convert_wan_transformer_to_diffusers(tensors))
        model.save_pretrained(destination / component)
    return destination


def smoothed(packed: Path, destination: Path) -> Path:
    """A four-bit directory whose layers have factors, those with one input the same."""
    experts = sorted(path.parent for path in packed.glob("*/config.json") if path.parent.name.startswith("transformer"))
    for expert in experts:
        (destination / expert.name).mkdir(parents=True)
        (destination / expert.name / "config.json").write_text((expert / "config.json").read_text())
        file = f"{original.STEM}.safetensors"
        tensors = load_file(expert / file)
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            path = name.removesuffix(".weight_scale")
            shared = path.rpartition(".")[0] if path.endswith(("to_q", "to_k", "to_v")) else path
            generator = torch.Generator().manual_seed(len(shared))
            factors = torch.rand(tensors[f"{path}.weight"].shape[1] * 2, generator=generator) + 0.5
            tensors[f"{path}.mul_scale"] = factors.bfloat16().float()
        save_file(tensors, destination / expert.name / file, {"format": "pt"})
    return destination


@pytest.mark.parametrize("method", ["mxfp4", "dual", "mxfp8"])
def test_the_original_layout_gives_what_diffusers_conversion_of_it_gives(wan, tmp_path, method):
    direct = contents(quantize(wan, tmp_path / "direct", CONFIGS[method]))
    diffusers = by_diffusers(wan, tmp_path / "diffusers")
    via = contents(quantize(diffusers, tmp_path / "via", CONFIGS[method]))
    assert direct.keys() == via.keys() and len(direct) == 4
    for name in direct:
        if name.endswith("config.json"):
            theirs = json.loads(via[name])
            assert theirs.pop("_diffusers_version")  # which converted it: the original has none to tell
            assert json.loads(direct[name]) == theirs
        else:
            assert direct[name] == via[name], name


def test_an_original_image_expert_loads(tmp_path):
    source = original.save(tmp_path / "original", "i2v")
    loaded = tiny.load(
        quantize(source, tmp_path / "packed", CONFIGS["mxfp4"], dtype=torch.float32) / "transformer", None, None
    )
    original.transformer("transformer", "i2v").save_pretrained(tmp_path / "float")
    assert tiny.same(loaded, tiny.load(tmp_path / "float", CONFIGS["mxfp4"], torch.float32))
    assert torch.isfinite(tiny.forward(loaded)).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", [*CONFIGS, *ONLY_VLLM])
def test_original_to_packed_to_vllm_omni_and_back(wan, tmp_path, method):
    diffusers = by_diffusers(wan, tmp_path / "diffusers")
    packed = quantize(diffusers, tmp_path / "packed", (CONFIGS | ONLY_VLLM)[method])
    exported = convert(packed, tmp_path / "exported", "vllm-omni")
    back = convert(exported, tmp_path / "back", "packed")
    assert contents(back) == contents(packed)
    for directory in (packed, exported, back):
        assert inspect_checkpoint(directory).clean
    reasons = {e.loaders["vLLM-Omni 0.30"] for e in inspect_checkpoint(exported).components}
    assert reasons == {None}


@pytest.mark.parametrize("method", CONFIGS)
def test_packed_to_sglang_and_back(wan, tmp_path, method):
    packed = quantize(wan, tmp_path / "packed", CONFIGS[method])
    exported = convert(packed, tmp_path / "exported", "sglang")
    back = convert(exported, tmp_path / "back", "packed")
    assert contents(back) == contents(packed)
    reasons = {e.loaders["SGLang 0.5.23"] for e in inspect_checkpoint(exported).components}
    assert len(reasons) == 1 and (None in reasons) == (method in ("mxfp4", "mxfp8"))


@pytest.mark.parametrize("method", [*CONFIGS, "w4a8", "w4a8 in places"])
def test_packed_to_modelslim_and_back(wan, tmp_path, method):
    config = (CONFIGS | ONLY_VLLM)[method]
    packed = quantize(wan, tmp_path / "packed", {"mxfp4_scale_alg": 0, **config} if "w4a8" in method else config)
    exported = convert(packed, tmp_path / "exported", "modelslim")
    assert {path.name for path in exported.iterdir()} == set(original.EXPERTS)
    assert contents(convert(exported, tmp_path / "back", "packed")) == contents(packed)
    for folder in original.EXPERTS:
        assert all(component.layout == "modelslim" for component in inspect_checkpoint(exported / folder).components)


def test_modelslim_holds_the_experts_and_the_base_gives_the_rest(pipeline, tmp_path):
    packed = quantize(pipeline, tmp_path / "packed", CONFIGS["mxfp8"], shard_size=200_000)
    exported = convert(packed, tmp_path / "exported", "modelslim", shard_size=200_000)
    assert {path.parent.name for path in exported.rglob("*") if path.is_file()} == set(original.EXPERTS)
    stem = "quant_model_weight_w8a8_mxfp8"
    for folder in original.EXPERTS:
        names = {path.name for path in (exported / folder).iterdir()} - {f"{stem}.safetensors.index.json"}
        shards = {name for name in names if name.startswith(f"{stem}-0000")}
        assert len(shards) > 1 and names - shards == {"config.json", "quant_model_description_w8a8_mxfp8.json"}
    back = convert(exported, tmp_path / "back", "packed", base=pipeline, shard_size=200_000)
    assert contents(back) == contents(packed)


def test_one_expert_lies_at_the_root_of_modelslims_directory(wan, tmp_path):
    packed = quantize(wan, tmp_path / "packed", CONFIGS["dual"]) / "transformer_2"
    exported = convert(packed, tmp_path / "exported", "modelslim")
    assert {path.suffix for path in exported.iterdir()} == {".json", ".safetensors"}
    assert contents(convert(exported, tmp_path / "back", "packed")) == contents(packed)


def test_a_family_whose_release_mxdit_does_not_know_has_no_modelslim_layout(tmp_path):
    flux.flux().bfloat16().save_pretrained(tmp_path / "float")
    packed = quantize(tmp_path / "float", tmp_path / "packed", CONFIGS["mxfp8"])
    with pytest.raises(InputError, match=r"does not know the names that Flux.* has in its own release"):
        convert(packed, tmp_path / "exported", "modelslim")
    assert not (tmp_path / "exported").exists()


SMOOTH = [
    *(("vllm-omni", name) for name in ("kept", "mxfp4", *ONLY_VLLM)),
    *((to, name) for to in ("sglang", "modelslim") for name in ("kept", "mxfp4")),
]


@pytest.mark.parametrize(("to", "config"), SMOOTH)
def test_smoothing_goes_there_and_back(wan, tmp_path, to, config):
    plain = quantize(wan, tmp_path / "plain", (CONFIGS | ONLY_VLLM)[config])
    packed = convert(smoothed(plain, tmp_path / "smoothed"), tmp_path / "packed", "packed")
    exported = convert(packed, tmp_path / "exported", to)
    if to == "modelslim":  # in the wrapper by which its readers know a smoothed layer
        (file,) = (exported / "high_noise_model").glob("*.safetensors")
        assert {f"blocks.1.self_attn.q.{name}" for name in ("div.mul_scale", "linear.weight", "linear.bias")} <= {
            *load_file(file)
        }
    back = contents(convert(exported, tmp_path / "back", "packed"))
    assert back == contents(packed) and any(b"mul_scale" in data for data in back.values())
    layer = tiny.load(tmp_path / "back" / "transformer").blocks[1].attn1.to_q
    assert layer.mul_scale.dtype == torch.float32 and not torch.equal(layer.mul_scale, torch.ones_like(layer.mul_scale))
    assert all(found.loaders["vLLM-Omni 0.30"] is None for found in inspect_checkpoint(exported).components) == (
        to == "vllm-omni"
    )


def test_single_scale_factors_are_neither_filled_in_nor_left_out(wan, tmp_path):
    """Where none are stored vLLM-Omni takes ones; so ones that are stored stay, and so does the key that wants them all."""
    plain = quantize(wan, tmp_path / "plain", CONFIGS["mxfp4"], {"transformer_2": None})
    ones, asked = f"{ALONE}.mul_scale", {"require_smooth_scale": True}
    folder = smoothed(plain, tmp_path / "smoothed") / "transformer"

    def some(tensors: layouts.Tensors) -> None:
        for name in [name for name in tensors if name.endswith("mul_scale") and ".ffn." in name]:
            del tensors[name]
        tensors[ones].fill_(1)

    layouts.change(folder, some)
    exported = convert(folder, tmp_path / "some", "vllm-omni")
    file = f"{original.STEM}.safetensors"
    factors = {n: t for n, t in load_file(exported / file).items() if n.endswith("mul_scale")}
    stored = {n: t for n, t in load_file(folder / file).items() if n.endswith("mul_scale")}
    assert factors.keys() == stored.keys() and all(torch.equal(factors[n], t) for n, t in stored.items())
    back = convert(exported, tmp_path / "some back", "packed")
    assert load_file(back / file).keys() == load_file(folder / file).keys()

    whole = smoothed(plain, tmp_path / "whole") / "transformer"
    layouts.change(whole, lambda tensors: tensors[ones].fill_(1))
    layouts.change_json(whole / "config.json", lambda config: config["quantization_config"].update(asked))
    exported = convert(whole, tmp_path / "asked", "vllm-omni")
    assert json.loads((exported / "config.json").read_text())["quantization_config"].items() >= asked.items()
    assert inspect_checkpoint(exported).components[0].loaders["vLLM-Omni 0.30"] is None
    back = convert(exported, tmp_path / "asked back", "packed")
    assert tiny.load(back).get_submodule(ALONE).mul_scale.eq(1).all()


@pytest.mark.parametrize("to", ["vllm-omni", "sglang"])
def test_a_pipeline_takes_everything_else_along(pipeline, tmp_path, to):
    packed = quantize(pipeline, tmp_path / "packed", CONFIGS["mxfp8"], shard_size=200_000)
    exported = convert(packed, tmp_path / "exported", to, shard_size=200_000)
    back = convert(exported, tmp_path / "back", "packed", shard_size=200_000)
    assert contents(back) == contents(packed)
    ours = {name for name in contents(packed) if name.startswith("transformer")}
    assert sum(name.endswith(".index.json") for name in ours) == 2
    theirs = contents(pipeline)
    assert {n: d for n, d in contents(exported).items() if n in theirs and not n.startswith("transformer")} == {
        n: d for n, d in theirs.items() if not n.startswith("transformer")
    }


@pytest.mark.parametrize("to", ["vllm-omni", "sglang", "modelslim"])
def test_an_expert_that_was_left_float_stays_so(wan, tmp_path, to):
    packed = quantize(wan, tmp_path / "packed", CONFIGS["mxfp4"], {"transformer_2": None})
    exported = convert(packed, tmp_path / "exported", to)
    assert contents(convert(exported, tmp_path / "back", "packed")) == contents(packed)
    folder = "low_noise_model" if to == "modelslim" else "transformer_2"
    assert "quantization_config" not in json.loads((exported / folder / "config.json").read_text())


def test_patterns_become_the_layers_they_name(wan, tmp_path):
    config = {"quant_method": "mxfp4", "w4a8_fallback_layers": ["blocks.*.ffn.*"]}
    packed = quantize(wan, tmp_path / "packed", config)
    exported = convert(packed, tmp_path / "exported", "vllm-omni")
    stated = json.loads((exported / "transformer" / "config.json").read_text())["quantization_config"]
    assert stated["w4a8_fallback_layers"] == [
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("ffn.net_0.proj", "ffn.net_2")
    ]
    back = convert(exported, tmp_path / "back", "packed")
    before, after = (activations(tiny.load(directory / "transformer")) for directory in (packed, back))
    assert before == after and set(before.values()) == {"mxfp4", "mxfp8"}


def test_steps_by_vllm_omnis_key_and_back(wan, tmp_path):
    config = {"quant_method": "mxfp4", "activation_steps": {"mxfp8": [0, 1, 3]}}
    packed = quantize(wan, tmp_path / "packed", config, {"transformer_2": "mxfp4"})
    exported = convert(packed, tmp_path / "exported", "vllm-omni")
    stated = [json.loads((exported / name / "config.json").read_text()) for name in ("transformer", "transformer_2")]
    assert [one["quantization_config"].get("w4a8_fallback_steps") for one in stated] == [[0, 1, 3], None]
    found = inspect_checkpoint(exported).components
    assert all(component.loaders["vLLM-Omni 0.30"] is None for component in found)
    assert [component.activation_steps for component in found] == [StepPolicy({"mxfp8": (0, 1, 3)}), None]
    assert contents(convert(exported, tmp_path / "back", "packed")) == contents(packed)


def test_the_steps_that_vllm_omni_has_stay_where_others_are_lost(wan, tmp_path):
    config = {"quant_method": "mxfp4", "activation_steps": {"mxfp8": [0, 1], "bf16": [2], "of": 4}}
    packed = quantize(wan, tmp_path / "packed", config)
    exported = convert(packed, tmp_path / "exported", "vllm-omni", allow_loss=True)
    stated = json.loads((exported / "transformer" / "config.json").read_text())["quantization_config"]
    assert stated["w4a8_fallback_steps"] == [0, 1] and "activation_steps" not in stated


def test_vllm_omni_refuses_steps_over_dual_scale_weights(wan, tmp_path):
    packed = quantize(wan, tmp_path / "packed", "mxfp4_dualscale")
    exported = convert(packed, tmp_path / "exported", "vllm-omni")
    file = exported / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["w4a8_fallback_steps"] = [0]
    file.write_text(json.dumps(config))
    first, second = inspect_checkpoint(exported).components
    assert first.loaders["vLLM-Omni 0.30"] == "W4A8 over dual-scale weights: it refuses them"
    assert second.loaders["vLLM-Omni 0.30"] is None
    back = convert(exported, tmp_path / "back", "packed")  # mxdit runs them
    assert tiny.load(back / "transformer").config.quantization_config.activation_steps == StepPolicy({"mxfp8": (0,)})


@pytest.mark.parametrize(
    ("config", "to", "what"),
    [
        ({"quant_method": "mxfp4", "activation": "bf16"}, "vllm-omni", "activation 'bf16'"),
        ({"quant_method": "mxfp4_dualscale", "activation": "bf16"}, "vllm-omni", "activation 'bf16'"),
        ({"quant_method": "mxfp4", "mxfp4_scale_alg": 0, "activation": "bf16"}, "sglang", "activation"),
        ({"quant_method": "mxfp4", "mxfp4_scale_alg": 2}, "sglang", "mxfp4_scale_alg 2"),
        ({"quant_method": "mxfp4", "activation_steps": {"bf16": [2]}}, "vllm-omni", "activation_steps in bf16"),
        (
            {"quant_method": "mxfp4", "activation_steps": {"mxfp8": [0], "of": 4}},
            "vllm-omni",
            "activation_steps of 4 steps",
        ),
        (
            {"quant_method": "mxfp4_dualscale", "activation_steps": {"mxfp8": [0]}},
            "vllm-omni",
            "activation_steps 0=mxfp8",
        ),
        (
            {"quant_method": "mxfp4", "mxfp4_scale_alg": 0, "activation_steps": {"mxfp8": [0]}},
            "sglang",
            "activation_steps 0=mxfp8",
        ),
        ({"quant_method": "mxfp4", "mxfp4_scale_alg": 0, "activation": "bf16"}, "modelslim", "activation 'bf16'"),
        ({"quant_method": "mxfp4_dualscale", "activation": "mxfp8"}, "modelslim", "activation 'mxfp8'"),
        ({"quant_method": "mxfp4", "mxfp4_scale_alg": 2}, "modelslim", "mxfp4_scale_alg 2"),
        (
            {"quant_method": "mxfp4_dualscale", "activation_steps": {"mxfp8": [0]}},
            "modelslim",
            "activation_steps 0=mxfp8",
        ),
    ],
)
def test_what_a_layout_cannot_say_is_named_before_it_is_lost(wan, tmp_path, config, to, what):
    packed = quantize(wan, tmp_path / "packed", config)
    with pytest.raises(InputError, match=f"{what}.*--allow-loss"):
        convert(packed, tmp_path / "exported", to)
    assert not (tmp_path / "exported").exists()
    exported = convert(packed, tmp_path / "exported", to, allow_loss=True)
    assert inspect_checkpoint(exported).clean


def test_a_float_checkpoint_is_no_source_of_a_conversion(wan, tmp_path):
    with pytest.raises(CheckpointError, match="not quantized"):
        convert(wan, tmp_path / "out", "vllm-omni")
