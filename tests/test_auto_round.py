"""AutoRound's MXFP8 and MXFP4: read to the very bytes, or refused by the key that says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import layouts
import tiny
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.errors import MXDiTError

PATH = "blocks.1.ffn.net.0.proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("auto-round")
    tiny.transformer().bfloat16().save_pretrained(root / "float")
    for method, keys in {"mxfp8": {}, "mxfp4": {"mxfp4_scale_alg": 0}}.items():
        config = {"quant_method": method, "ignored_layers": ["blocks.0.attn1.to_out.0"], **keys}
        quantize_checkpoint(root / "float", root / method, config).write()
        config = {**config, "activation": "mxfp8"}
        quantize_checkpoint(root / "float", root / f"{method} act8", config).write()
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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"data_type": "int"}, "another kind than MXFP8 and MXFP4; got data_type 'int'; expected 'mx_fp'"),
    "another rounding of scales": ({"data_type": "mx_fp_rceil"}, "got data_type 'mx_fp_rceil'"),
    "another block": ({"group_size": 16}, "got group_size 16; expected 32"),
    "activations of another kind": ({"act_data_type": "nv_fp4"}, "got act_data_type 'nv_fp4'"),
    "weights alone": ({"act_bits": 16}, "AutoRound scheme that mxdit does not have; got bits 8, act_bits 16"),
    "the config says four bits": ({"bits": 4, "act_bits": 4}, "something else of a layer than the files; got mxfp8 stored; expected bits 4"),
    "a layer said to be float": ({"extra_config": {PATH: {"bits": 16}}}, f"{PATH}: the config says something else"),
    "a method that no release has": ({"quant_method": "mxfp8_mxfp4_dualscale"}, "mxfp8_mxfp4_dualscale"),
}  # fmt: skip


@pytest.mark.parametrize("keys, match", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(root, tmp_path, keys, match):
    theirs = layouts.auto_round(root / "mxfp8", tmp_path / "auto-round", **keys)
    with pytest.raises(MXDiTError, match=match):
        convert_checkpoint(theirs, tmp_path / "packed", "packed")
