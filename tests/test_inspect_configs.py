"""`mxdit inspect` where config.json or a description says something else than the tensors, or where nothing can be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as library
import torch

import layouts
from layouts import OUT, UP, Config, Q, change, change_json
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint

pytestmark = pytest.mark.slow

DESCRIPTION = "quant_model_description.json"
RUNTIME_QKV = "blocks.0.attn1.to_qkv"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts.experts(tmp_path_factory.mktemp("experts"))


def ignore(*more: str, without: str = "") -> Callable[[Config], Any]:
    def edit(config: Config) -> None:
        quantization = config["quantization_config"]
        quantization["ignored_layers"] = [*(n for n in quantization["ignored_layers"] if n != without), *more]

    return edit


def describe(kind: str | None, *names: str) -> Callable[[Config], Any]:
    return lambda d: [d.pop(name) if kind is None else d.update({name: kind}) for name in names]


SAID: dict[str, tuple[str, str, Callable[[Config], Any], str]] = {
    "a layer listed that has scales": ("mxfp4", "config.json", ignore(UP), f"{UP} listed; expected no scales stored"),
    "a layer not listed that has none": ("dual", "config.json", ignore(without=OUT), f"{OUT} not listed; expected scales stored"),
    "one of q, k and v listed": ("mxfp4", "config.json", ignore(Q), Q),
    "a pattern that matches nothing": ("mxfp4", "config.json", ignore("blocks.9.*"), "'blocks.9.*': the pattern matches nothing"),
    "vLLM-Omni: listed": ("mxfp4 vllm-omni", "config.json", ignore(RUNTIME_QKV), f"{Q} listed; expected no scales stored"),
    "vLLM-Omni: not listed": ("dual vllm-omni", "config.json", ignore(without="blocks.0.attn1.to_out"), f"{OUT} not listed"),
    "another method": ("mxfp8", "config.json", lambda c: c["quantization_config"].update(quant_method="mxfp4"), "misshapen or mistyped tensor of a mxfp4 layer"),
    "no word of how": ("mxfp4", "config.json", lambda c: c.pop("quantization_config"), f"{Q}.weight: nothing says how this and 19 other layers"),
    "no word of how, dual": ("dual vllm-omni", "config.json", lambda c: c.pop("quantization_config"), "18 other layers are quantized"),
    "quantized by its word alone": ("float", "config.json", lambda c: c.update(quantization_config={"quant_method": "mxfp4", "layout": "packed", "is_checkpoint_serialized": True}), "said to be quantized, and no layer is"),
    "factors that it asks for": ("mxfp4", "config.json", lambda c: c["quantization_config"].update(require_smooth_scale=True), f"{Q}.mul_scale: missing tensor"),
    "vLLM-Omni: factors that it asks for": ("mxfp4 vllm-omni", "config.json", lambda c: c["quantization_config"].update(require_smooth_scale=True), f"{Q}.mul_scale: missing tensor"),
    "a block fewer": ("mxfp4", "config.json", lambda c: c.update(num_layers=1), "blocks.1."),
    "another width": ("mxfp4", "config.json", lambda c: c.update(ffn_dim=640), "(576, 32) uint8; expected (640, 32) uint8"),
    "eight bits by its description": ("mxfp4 sglang", DESCRIPTION, describe("W8A8_MXFP8", *(f"{UP}.{x}" for x in ("weight", "weight_scale"))), f"{UP}.weight: misshapen or mistyped tensor of a mxfp8 layer"),
    "four bits by its description": ("mxfp8 sglang", DESCRIPTION, describe("W4A4_MXFP4", f"{UP}.weight"), f"{UP}.weight: a value that FP4 does not have"),
    "dual by its description": ("mxfp4 sglang", DESCRIPTION, lambda d: d.update({n: k + "_DUALSCALE" for n, k in d.items() if k == "W4A4_MXFP4"}), ".weight_dual_scale: missing tensor"),
    "float by its description": ("mxfp4 sglang", DESCRIPTION, describe("FLOAT", f"{UP}.weight"), f"{UP}.weight_scale: the description calls this layer float; got scales"),
    "quantized by its description": ("dual sglang", DESCRIPTION, describe("W4A4_MXFP4_DUALSCALE", f"{OUT}.weight"), f"{OUT}.weight: the description says mxfp4_dualscale; got (64, 64) bfloat16"),
    "no word in its description": ("mxfp4 sglang", DESCRIPTION, describe(None, f"{UP}.weight"), f"{UP}.weight: the description says nothing of this layer"),
}  # fmt: skip


@pytest.mark.parametrize("name, file, edit, said", SAID.values(), ids=SAID.keys())
def test_what_is_said_and_what_is_there_disagree(monkeypatch, capsys, experts, tmp_path, name, file, edit, said):
    folder = shutil.copytree(experts[name], tmp_path / "broken")
    change_json(folder / file, edit)
    code, out, _ = layouts.inspect(monkeypatch, capsys, folder, "--json")
    (expert,) = json.loads(out)["experts"]
    assert code == 1 and any(said in finding for finding in expert["findings"]), expert["findings"]
    assert all(reason is not None for reason in expert["loaders"].values())
    base = [] if name == "float" else ["--base", experts["float"]]
    if base and file == DESCRIPTION:  # a base fills in what is not there, and hides nothing that is wrong
        assert layouts.inspect(monkeypatch, capsys, folder, *base)[0] == 1


def test_a_quantized_layer_that_is_lost_is_not_the_bases_to_give(monkeypatch, capsys, experts, tmp_path):
    folder = shutil.copytree(experts["mxfp4 sglang"], tmp_path / "broken")
    change(folder, lambda tensors: [tensors.pop(f"{UP}.{leaf}") for leaf in ("weight", "weight_scale")])
    code, out, _ = layouts.inspect(monkeypatch, capsys, folder, "--base", experts["float"], "--json")
    (expert,) = json.loads(out)["experts"]
    assert code == 1 and [finding.partition(";")[0].partition(". ")[0] for finding in expert["findings"]] == [
        f"{UP}.weight: missing tensor",
        f"{UP}.weight_scale: missing tensor",
    ]


def test_a_block_of_eight_bits_among_four_is_a_mixture_or_comes_from_the_base(monkeypatch, capsys, experts, tmp_path):
    folder = shutil.copytree(experts["mxfp4 sglang"], tmp_path / "mixed")
    eight = library.load_file(next(experts["mxfp8 sglang"].glob("*.safetensors")))
    names = [
        name for name in eight if name.startswith("blocks.0.") and f"{name.rpartition('.')[0]}.weight_scale" in eight
    ]
    change(folder, lambda tensors: tensors.update({name: eight[name] for name in names}))
    change_json(folder / DESCRIPTION, describe("W8A8_MXFP8", *(n for n in names if "weight" in n)))
    code, out, _ = layouts.inspect(monkeypatch, capsys, folder, "--json")
    (expert,) = json.loads(out)["experts"]
    assert code == 0 and expert["linears"] == {"float": 6, "mxfp4": 10, "mxfp8": 10}
    convert_checkpoint(folder, tmp_path / "packed", "packed").write()
    packed = library.load_file(next((tmp_path / "packed").glob("*.safetensors")))
    four, whole = (library.load_file(next(experts[of].glob("*.safetensors"))) for of in ("mxfp4", "mxfp8"))
    assert packed.keys() == four.keys()
    for name, tensor in packed.items():
        assert torch.equal(tensor, (whole if name in names else four)[name]), name
    convert_checkpoint(folder, tmp_path / "out", "packed", base=experts["float"], fallback_from_base=True).write()
    found = inspect_checkpoint(tmp_path / "out").components[0]
    assert found.linears == {"float": 16, "mxfp4": 10} and not found.faults


# -- unreadable --------------------------------------------------------------------------------------------------------


def slim(folder: Path) -> None:
    """As msModelSlim names its files."""
    next(folder.glob("*.safetensors")).rename(folder / "quant_model_weight_mxfp4.safetensors")


UNREADABLE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no directory": ("float", shutil.rmtree, "no such directory"),
    "nothing in it": ("float", lambda f: [p.unlink() for p in f.iterdir()], "no checkpoint that mxdit knows"),
    "no weights": ("mxfp4", lambda f: [p.unlink() for p in f.glob("*.safetensors")], "no weights; expected files named *.safetensors"),
    "weights and no config": ("mxfp4", lambda f: (f / "config.json").unlink(), "no config.json beside the weights"),
    "a config that is no JSON": ("mxfp4", lambda f: (f / "config.json").write_text("{"), "config.json: the file cannot be read"),
    "a config that is a list": ("mxfp4", lambda f: (f / "config.json").write_text("[]"), "config.json: the file holds no JSON object"),
    "a config without a model": ("mxfp4", lambda f: (f / "config.json").write_text("{}"), "mxdit does not know this kind of model"),
    "a config that no model has": ("float", lambda f: change_json(f / "config.json", lambda c: c.update(rope_max_seq_len=None)), "no model can be built"),
    "a config of a billion layers": ("float", lambda f: change_json(f / "config.json", lambda c: c.update(num_layers=10**9)), "num_layers 1000000000"),
    "a config from the future": ("mxfp4", lambda f: change_json(f / "config.json", lambda c: c["quantization_config"].update(version=2)), "unknown version of the layout"),
    "another's config, not serialized": ("mxfp4 vllm-omni", lambda f: change_json(f / "config.json", lambda c: c["quantization_config"].pop("is_checkpoint_mxfp4_serialized")), "does not say that the weights are quantized already"),
    "another's config, of numbers": ("mxfp4 vllm-omni", lambda f: change_json(f / "config.json", lambda c: c["quantization_config"].update(ignored_layers=[1])), "ignored_layers is no list"),
    "no description beside quantized files": ("mxfp4 sglang", lambda f: [slim(f), (f / DESCRIPTION).unlink()], "no description of the quantized model"),
    "two descriptions": ("mxfp4 sglang", lambda f: shutil.copy(f / DESCRIPTION, f / "quant_model_description_2.json"), "more than one description"),
    "a description that is no JSON": ("mxfp4 sglang", lambda f: (f / DESCRIPTION).write_text("{"), f"{DESCRIPTION}: the file cannot be read"),
    "a type unknown": ("mxfp4 sglang", lambda f: change_json(f / DESCRIPTION, describe("W4A16", f"{UP}.weight")), f"{UP}.weight: mxdit does not read layers of this type; got 'W4A16'"),
    "a type that is none": ("mxfp4 sglang", lambda f: change_json(f / DESCRIPTION, lambda d: d.update({f"{UP}.weight": []})), "got []"),
    "a truncated file": ("dual", lambda f: [p.write_bytes(p.read_bytes()[:-1]) for p in f.glob("*.safetensors")], "the file is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("name, damage, said", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_read_is_one_line_and_code_2(monkeypatch, capsys, experts, tmp_path, name, damage, said):
    folder = shutil.copytree(experts[name], tmp_path / "broken")
    damage(folder)
    code, out, err = layouts.inspect(monkeypatch, capsys, folder)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err, err
