"""`mxdit inspect`: every fault of the tensors is named with what was seen and what was wanted; and who can load what."""

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
import mxdit
import tiny
from layouts import DOWN, OUT, UP, K, Q, Tensors, V, change
from mxdit.checkpoint import quantize_checkpoint

pytestmark = pytest.mark.slow

RUNTIMES = ("diffusers + mxdit", "vLLM-Omni 0.30", "vLLM-Omni 0.30 with mxdit", "SGLang 0.5.23")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts.experts(tmp_path_factory.mktemp("experts"))


# -- clean -------------------------------------------------------------------------------------------------------------

CONVERT = "mxdit convert --to"
QUANTIZED = tiny.LINEARS * tiny.BLOCKS
VERDICTS: dict[str, tuple[str, dict[str, int], list[str | None]]] = {
    "float": ("diffusers", {"float": 26}, [None] * 4),
    "original": ("original", {"float": 26}, ["mxdit quantize"] * 4),
    "dual": ("packed", {"float": 7, "mxfp4_dualscale": 19}, [None, f"{CONVERT} vllm-omni", None, f"{CONVERT} sglang"]),
    "mxfp4": ("packed", {"float": 6, "mxfp4": 20}, [None, f"{CONVERT} vllm-omni", None, f"{CONVERT} sglang"]),
    "smooth": ("packed", {"float": 6, "mxfp4": 20}, [None, f"{CONVERT} vllm-omni", None, f"{CONVERT} sglang"]),
    "mxfp8": ("packed", {"float": 6, "mxfp8": 20}, [None, f"{CONVERT} vllm-omni", None, f"{CONVERT} sglang"]),
    "dual vllm-omni": ("vllm-omni", {"float": 7, "mxfp4_dualscale": 19}, [f"{CONVERT} packed", None, None, f"{CONVERT} sglang"]),
    "mxfp4 vllm-omni": ("vllm-omni", {"float": 6, "mxfp4": 20}, [f"{CONVERT} packed", None, None, f"{CONVERT} sglang"]),
    "smooth vllm-omni": ("vllm-omni", {"float": 6, "mxfp4": 20}, [f"{CONVERT} packed", None, None, f"{CONVERT} sglang"]),
    "mxfp8 vllm-omni": ("vllm-omni", {"float": 6, "mxfp8": 20}, [f"{CONVERT} packed", None, None, f"{CONVERT} sglang"]),
    "dual sglang": ("sglang", {"float": 7, "mxfp4_dualscale": 19}, [f"{CONVERT} packed", f"{CONVERT} vllm-omni", f"{CONVERT} packed", "AttributeError"]),
    "mxfp4 sglang": ("sglang", {"float": 6, "mxfp4": 20}, [f"{CONVERT} packed", f"{CONVERT} vllm-omni", f"{CONVERT} packed", None]),
    "smooth sglang": ("sglang", {"float": 6, "mxfp4": 20}, [f"{CONVERT} packed", f"{CONVERT} vllm-omni", f"{CONVERT} packed", None]),
    "mxfp8 sglang": ("sglang", {"float": 6, "mxfp8": 20}, [f"{CONVERT} packed", f"{CONVERT} vllm-omni", f"{CONVERT} packed", None]),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
def test_a_clean_directory(monkeypatch, capsys, experts, name):
    layout, linears, loaders = VERDICTS[name]
    code, out, err = layouts.inspect(monkeypatch, capsys, experts[name], "--json")
    said = json.loads(out)
    (expert,) = said["experts"]
    assert (code, err, said["clean"], expert["findings"], expert["notes"]) == (0, "", True, [], [])
    assert (expert["layout"], expert["linears"]) == (layout, linears)
    assert expert["kept"] == ([OUT] if "dual" in name else [])
    assert expert["bytes"] == sum(
        t.nbytes for f in experts[name].glob("*.safetensors") for t in library.load_file(f).values()
    )
    for runtime, reason in zip(RUNTIMES, loaders, strict=True):
        assert (expert["loaders"][runtime] is None) == (reason is None), (runtime, expert["loaders"])
        assert reason is None or reason in expert["loaders"][runtime]
    code, out, _ = layouts.inspect(monkeypatch, capsys, experts[name])
    assert code == 0 and f"{layout} layout" in out and out.endswith("clean\n")
    assert out.count("loads it") == loaders.count(None) and (f"float inside the blocks: {OUT}" in out) == (
        "dual" in name
    )


@pytest.mark.parametrize("name", VERDICTS)
def test_what_it_says_of_diffusers_is_what_diffusers_does(experts, name):
    _, linears, (refused, *_) = VERDICTS[name]
    try:
        model = tiny.load(experts[name], dtype=None)
    except (mxdit.MXDiTError, ValueError):
        assert refused
        return
    # diffusers reads SGLang's eight-bit codes as float weights and drops their scales: no error, and not the model.
    quantized = sum(count for method, count in linears.items() if method != "float")
    assert (len(mxdit.report_of(model).quantized) == quantized) is not bool(refused)
    assert torch.isfinite(tiny.forward(model)).all()


@pytest.mark.parametrize("name", [f"{UP}.mul_scale", f"{UP}.div.mul_scale"])
def test_sglang_needs_factors_under_both_names(monkeypatch, capsys, experts, tmp_path, name):
    folder = shutil.copytree(experts["smooth sglang"], tmp_path / "smooth")
    layouts.change_json(folder / "quant_model_description.json", lambda said: said.pop(name))
    code, out, _ = layouts.inspect(monkeypatch, capsys, folder, "--json")
    reason = json.loads(out)["experts"][0]["loaders"]["SGLang 0.5.23"]
    assert code == 0 and reason.startswith(f"{UP} is smoothed") and name in reason


def test_a_pipeline_is_inspected_expert_by_expert(monkeypatch, capsys, tmp_path):
    tiny.save(tmp_path / "wan")
    quantize_checkpoint(tmp_path / "wan", tmp_path / "packed", "mxfp4", {"transformer_2": None}).write()
    change(tmp_path / "packed" / "transformer_2", lambda t: t.pop("proj_out.bias"))
    code, out, _ = layouts.inspect(monkeypatch, capsys, tmp_path / "packed", "--json")
    said = json.loads(out)
    assert code == 1 and said["pipeline"] and not said["clean"]
    assert [(e["component"], e["layout"], len(e["findings"])) for e in said["experts"]] == [
        ("transformer", "packed", 0),
        ("transformer_2", "diffusers", 1),
    ]
    assert said["experts"][0]["loaders"]["diffusers + mxdit"] is None
    assert "proj_out.bias: missing" in said["experts"][1]["loaders"]["diffusers + mxdit"]


# -- broken ------------------------------------------------------------------------------------------------------------


def put(name: str, at: int, value: float) -> Callable[[Tensors], Any]:
    def edit(tensors: Tensors) -> None:
        flat = tensors[name].view(torch.uint8) if tensors[name].dtype.itemsize == 1 else tensors[name]
        flat.view(-1)[at] = value

    return edit


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def cut(name: str, axis: int = 0) -> Callable[[Tensors], Any]:
    return lambda t: t.update({name: t[name].narrow(axis, 0, t[name].shape[axis] - 1).contiguous()})


def drop(*names: str) -> Callable[[Tensors], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def both(*edits: Callable[[Tensors], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: [edit(tensors) for edit in edits]


CODE = {
    value: code for code, value in enumerate(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist())
}
NOWHERE = "a tensor that the model has no place for"
UNEQUAL = "layers that share their input are smoothed differently"
# expert, what happens to its tensors, and in the first finding: the tensor, the fault, what was seen, what was wanted.
BROKEN: dict[str, tuple[str, Callable[[Tensors], Any], str, str, str, str]] = {
    "a NaN scale": ("mxfp4", put(f"{UP}.weight_scale", 7, 255), f"{UP}.weight_scale", "NaN", "0xFF at 1 of 1152", "0 to 0xFE"),
    "NaN scales, numeric": ("dual vllm-omni", put(f"{V}.weight_scale", 0, 255), f"{V}.weight_scale", "NaN", "0xFF at 1", "0xFE"),
    "an off-grid value": ("dual vllm-omni", put(f"{DOWN}.weight", 579, CODE[5.0]), f"{DOWN}.weight", "FP4 does not", "5.0 at (1, 3)", "4, 6"),
    "a value too large": ("mxfp4 vllm-omni", put(f"{Q}.weight", 0, CODE[8.0]), f"{Q}.weight", "FP4 does not", "8.0 at (0, 0)", "4, 6"),
    "a value that is NaN": ("mxfp4 vllm-omni", put(f"{Q}.weight", 1, 0x7F), f"{Q}.weight", "FP4 does not", "nan at (0, 1)", "4, 6"),
    "an eight-bit NaN": ("mxfp8", put(f"{Q}.weight", 3, 0xFF), f"{Q}.weight", "mean NaN", "at 1 of 4096", "numbers"),
    "a negative dual scale": ("dual", put(f"{UP}.weight_dual_scale", 2, -0.5), f"{UP}.weight_dual_scale", "negative", "-0.5", "at least 0"),
    "an infinite dual scale": ("dual", put(f"{UP}.weight_dual_scale", 2, torch.inf), f"{UP}.weight_dual_scale", "finite", "inf", "finite"),
    "a NaN dual scale": ("dual sglang", put(f"{UP}.weight_dual_scale", 2, torch.nan), f"{UP}.weight_dual_scale", "finite", "nan", "finite"),
    "a factor of zero": ("dual", put(f"{UP}.mul_scale", 5, 0.0), f"{UP}.mul_scale", "positive in bf16", "0.0 at channel 5", "above 0"),
    "a negative factor": ("dual", put(f"{UP}.mul_scale", 5, -1.0), f"{UP}.mul_scale", "positive in bf16", "-1.0 at channel 5", "above 0"),
    "an infinite factor": ("dual", put(f"{UP}.mul_scale", 5, torch.inf), f"{UP}.mul_scale", "finite", "inf at channel 5", "3.39e38"),
    "a NaN factor": ("dual vllm-omni", put(f"{UP}.mul_scale", 0, torch.nan), f"{UP}.mul_scale", "finite", "nan at channel 0", "above 0"),
    "a factor that bf16 rounds to inf": ("dual", put(f"{UP}.mul_scale", 63, 3.4e38), f"{UP}.mul_scale", "finite", "at channel 63", "3.39e38"),
    "a factor that bf16 rounds to zero": ("dual", put(f"{UP}.mul_scale", 1, 1e-45), f"{UP}.mul_scale", "positive", "at channel 1", "above 0"),
    "another factor for k": ("dual", put(f"{K}.mul_scale", 9, 3.0), f"{Q}.mul_scale", UNEQUAL, f"{Q}, {K}, {V}", "equal mul_scale"),
    "no factors for v": ("dual", drop(f"{V}.mul_scale"), f"{Q}.mul_scale", UNEQUAL, f"{Q}, {K}, {V}", "equal mul_scale"),
    "a float layer that is smoothed": ("dual", lambda t: t.update({f"{OUT}.mul_scale": torch.ones(64)}), f"{OUT}.mul_scale", "was smoothed", "", "--base"),
    "factors in eight bits": ("mxfp8", lambda t: t.update({f"{UP}.mul_scale": torch.ones(64)}), f"{UP}.mul_scale", "mxfp8 is not smoothed", "four-bit", "to four bits"),
    "a factor of zero, single scale": ("smooth sglang", put(f"{UP}.mul_scale", 5, 0.0), f"{UP}.mul_scale", "positive in bf16", "0.0 at channel 5", "above 0"),
    "another factor for k, single scale": ("smooth vllm-omni", put(f"{K}.mul_scale", 9, 3.0), f"{Q}.mul_scale", UNEQUAL, f"{Q}, {K}, {V}", "equal mul_scale"),
    "no factors for v, single scale": ("smooth", drop(f"{V}.mul_scale"), f"{Q}.mul_scale", UNEQUAL, f"{Q}, {K}, {V}", "equal mul_scale"),
    "a dual scale in a single scale": ("mxfp4", lambda t: t.update({f"{UP}.weight_dual_scale": torch.ones(576, 1, 1)}), f"{UP}.weight_dual_scale", NOWHERE, "(576, 1, 1)", ""),
    "no scale": ("dual", drop(f"{UP}.weight_scale"), f"{UP}.weight_scale", "missing tensor", "", "again"),
    "no dual scale": ("dual", drop(f"{UP}.weight_dual_scale"), f"{UP}.weight_dual_scale", "missing tensor", "", "again"),
    "no weight": ("mxfp4", drop(f"{UP}.weight"), f"{UP}.weight", "missing tensor", "", "again"),
    "no bias": ("mxfp8", drop(f"{UP}.bias"), f"{UP}.bias", "missing tensor", "", "--base"),
    "no norm": ("dual", drop("blocks.1.norm2.weight"), "blocks.1.norm2.weight", "missing tensor", "", "--base"),
    "a float weight missing": ("float", drop(f"{Q}.weight"), f"{Q}.weight", "missing tensor", "", "--base"),
    "no layer at all": ("mxfp4 sglang", drop(f"{UP}.weight", f"{UP}.weight_scale"), f"{UP}.weight", "missing tensor", "", "again"),
    "a tensor more": ("dual", lambda t: t.update(lora=torch.ones(2)), "lora", NOWHERE, "(2,) float32", ""),
    "a block more": ("float", lambda t: t.update({"blocks.2.norm2.bias": torch.ones(64)}), "blocks.2.norm2.bias", NOWHERE, "(64,)", ""),
    "a row less": ("mxfp4", cut(f"{UP}.weight"), f"{UP}.weight", "misshapen", "(575, 32) uint8", "(576, 32) uint8"),
    "a scale less": ("mxfp4", cut(f"{UP}.weight_scale", 1), f"{UP}.weight_scale", "misshapen", "(576, 1)", "(576, 2) uint8"),
    "a dual scale less": ("dual", cut(f"{DOWN}.weight_dual_scale", 1), f"{DOWN}.weight_dual_scale", "misshapen", "(64, 1, 1)", "(64, 2, 1) float32"),
    "a factor less": ("dual", cut(f"{UP}.mul_scale"), f"{UP}.mul_scale", "misshapen", "(63,)", "(64,)"),
    "a weight in one row": ("mxfp4 vllm-omni", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(-1)}), f"{UP}.weight", "misshapen", "(36864,)", "(576, 32)"),
    "a bias less": ("mxfp4", cut(f"{UP}.bias"), f"{UP}.bias", "misshapen", "(575,) bfloat16", "(576,)"),
    "signed scales": ("mxfp4", cast(f"{UP}.weight_scale", torch.int8), f"{UP}.weight_scale", "mistyped", "int8", "uint8"),
    "dual scales in half": ("dual", cast(f"{UP}.weight_dual_scale", torch.bfloat16), f"{UP}.weight_dual_scale", "mistyped", "bfloat16", "float32"),
    "a bias of integers": ("mxfp4", cast(f"{UP}.bias", torch.int64), f"{UP}.bias", "mistyped", "int64", "bfloat16"),
    "codes with no word of them": ("float", lambda t: t.update({f"{UP}.weight": torch.ones(576, 32, dtype=torch.uint8)}), f"{UP}.weight", "without a weight_scale", "(576, 32) uint8", "float"),
    "a quantized layer outside": ("mxfp4", lambda t: t.update({"proj_out.weight": torch.ones(64, 32, dtype=torch.uint8), "proj_out.weight_scale": torch.ones(64, 2, dtype=torch.uint8)}), "proj_out.weight_scale", "outside the blocks", "", ""),
    "a layer in floats, not listed": ("mxfp4", lambda t: [drop(f"{UP}.weight", f"{UP}.weight_scale")(t), t.update({f"{UP}.weight": torch.ones(576, 64).bfloat16()})], "config.json", "ignored_layers", f"{UP} not listed", "scales stored"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, edit, where, what, seen, wanted", BROKEN.values(), ids=BROKEN.keys())
def test_each_fault_is_named(monkeypatch, capsys, experts, tmp_path, name, edit, where, what, seen, wanted):
    folder = shutil.copytree(experts[name], tmp_path / "broken")
    change(folder, edit)
    code, out, err = layouts.inspect(monkeypatch, capsys, folder, "--json")
    (expert,) = json.loads(out)["experts"]
    assert code == 1 and err == "" and 1 <= len(expert["findings"]) <= 2
    first = expert["findings"][0]
    place, _, rest = first.partition(f"{where}: ")
    assert rest and (not place or place.endswith((": ", "/"))), first
    assert what in rest and seen in rest and wanted in rest, first
    assert all(reason is not None for reason in expert["loaders"].values())
    code, out, _ = layouts.inspect(monkeypatch, capsys, folder)
    assert code == 1 and f"  wrong: {first}" in out.splitlines() and "findings" in out.splitlines()[-1]
