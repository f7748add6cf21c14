"""AutoRound's MXFP8 and MXFP4: read to the very bytes, or refused by the key that says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import layouts
import tiny
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.errors import MXDiTError

PATH = "blocks.1.ffn.net.0.proj"
# The method of most layers, and that of the others.
MIXED: dict[str, Any] = {
    "mxfp4 few in eight": {"quant_method": "mxfp4", "layer_methods": {"mxfp8": [PATH]}, "mxfp4_scale_alg": 0},
    "mxfp8 few in four": {"quant_method": "mxfp8", "layer_methods": {"mxfp4": [PATH]}, "mxfp4_scale_alg": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto-round")
    tiny.transformer().bfloat16().save_pretrained(root / "float")
    for method, keys in {"mxfp8": {}, "mxfp4": {"mxfp4_scale_alg": 0}}.items():
        config = {"quant_method": method, "ignored_layers": ["blocks.0.attn1.to_out.0"], **keys}
        quantize_checkpoint(root / "float", root / method, config).write()
        config = {**config, "activation": "mxfp8"}
        quantize_checkpoint(root / "float", root / f"{method} act8", config).write()
    for name, config in MIXED.items():
        quantize_checkpoint(root / "float", root / name, config).write()
    return root


@pytest.mark.parametrize("made, keys", [("mxfp8", {}), ("mxfp4", {}), ("mxfp4 act8", {"act_bits": 8})])
def test_it_becomes_packed_with_the_same_bytes(root, tmp_path, made, keys):
    extra = {"extra_config": {"blocks.0.attn1.to_out.0": {"bits": 16, "data_type": "float"}}}
    theirs = layouts.auto_round(root / made, tmp_path / "auto-round", **keys, **extra)
    convert_checkpoint(theirs, tmp_path / "packed", "packed").write()
    for file in (tiny.WEIGHTS, "config.json"):
        assert (tmp_path / "packed" / file).read_bytes() == (root / made / file).read_bytes()
    found = inspect_checkpoint(theirs)
    assert found.clean and found.components[0].layout == "auto-round"
    assert found.components[0].loaders["diffusers + mxdit"] == "the auto-round layout: mxdit convert --to packed"


EIGHT, FOUR = {"bits": 8, "act_bits": 8}, {"bits": 4, "act_bits": 4}


@pytest.mark.parametrize(
    "made, own", [("mxfp4 few in eight", EIGHT), ("mxfp8 few in four", FOUR), ("mxfp8 few in four", {"bits": 4})]
)
def test_layers_of_their_own_bits_become_layers_of_their_own_method(root, tmp_path, made, own):
    theirs = layouts.auto_round(root / made, tmp_path / "auto-round", extra_config={PATH: own})
    convert_checkpoint(theirs, tmp_path / "packed", "packed").write()
    assert (tmp_path / "packed" / tiny.WEIGHTS).read_bytes() == (root / made / tiny.WEIGHTS).read_bytes()
    stated = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    wanted = json.loads((root / made / "config.json").read_text())["quantization_config"]
    raised = {"w4a8_fallback_layers": [PATH]} if own == {"bits": 4} else {}
    assert stated == wanted | raised
    (expert,) = inspect_checkpoint(theirs).components
    assert not expert.faults and sorted(expert.linears.values()) == [1, 6, 19]
    assert tiny.forward(tiny.load(tmp_path / "packed")).isfinite().all()


def test_four_bits_with_activations_in_eight_at_some_layers_only(root, tmp_path):
    extra = {"blocks.0.attn1.to_out.0": {"bits": 16}, PATH: {"act_bits": 8}}
    theirs = layouts.auto_round(root / "mxfp4", tmp_path / "auto-round", extra_config=extra)
    convert_checkpoint(theirs, tmp_path / "packed", "packed").write()
    stated = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (stated["activation"], stated["w4a8_fallback_layers"]) == ("mxfp4", [PATH])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"data_type": "int"}, "another kind than MXFP8 and MXFP4; got data_type 'int'; expected 'mx_fp'"),
    "another rounding of scales": ({"data_type": "mx_fp_rceil"}, "got data_type 'mx_fp_rceil'"),
    "another block": ({"group_size": 16}, "got group_size 16; expected 32"),
    "activations of another kind": ({"act_data_type": "nv_fp4"}, "got act_data_type 'nv_fp4'"),
    "weights alone": ({"act_bits": 16}, "AutoRound scheme that mxdit does not have; got bits 8, act_bits 16"),
    "the config says four bits": ({"bits": 4, "act_bits": 4}, "something else of a layer than the files; got mxfp8 stored; expected bits 4"),
    "no word of activations": ({"act_bits": None}, "got bits 8, act_bits None"),
    "activations in other blocks": ({"act_group_size": 16}, "got act_group_size 16; expected 32"),
    "a layer of integers": ({"extra_config": {PATH: {"data_type": "int"}}}, f"{PATH}: an AutoRound checkpoint of another kind.*got data_type 'int'"),
    "a layer in W8A4": ({"extra_config": {PATH: {"act_bits": 4}}}, f"{PATH}: an AutoRound scheme that mxdit does not have; got bits 8, act_bits 4"),
    "a pattern": ({"extra_config": {r"blocks\\.0\\..*": {"bits": 16}}}, "something else than keys of a layer that is in the files; .*Patterns are not read"),
    "a word for a layer": ({"extra_config": {PATH: 4}}, f"{PATH}: extra_config has something else than keys"),
    "a list of layers": ({"extra_config": [PATH]}, "extra_config has something else than keys"),
    "a layer said to be in four bits": ({"extra_config": {PATH: {"bits": 4}}}, f"{PATH}: the config says something else of a layer than the files; got mxfp8 stored; expected bits 4"),
    "a layer said to be float": ({"extra_config": {PATH: {"bits": 16}}}, f"{PATH}: the config says something else"),
    "a method that no release has": ({"quant_method": "mxfp8_mxfp4_dualscale"}, "mxfp8_mxfp4_dualscale"),
}  # fmt: skip


@pytest.mark.parametrize("keys, match", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(root, tmp_path, keys, match):
    theirs = layouts.auto_round(root / "mxfp8", tmp_path / "auto-round", **keys)
    with pytest.raises(MXDiTError, match=match):
        convert_checkpoint(theirs, tmp_path / "packed", "packed")
