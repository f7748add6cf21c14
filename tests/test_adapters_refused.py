"""Adapters that are refused, and loads that fail: the model is afterwards what it was, with the adapters that it had."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

import loras
import mxdit
import tiny
from adapted import Untouched, lora
from mxdit.checkpoint.loras import check_fits
from mxdit.errors import CheckpointError, FormatError, InputError, ModelError
from mxdit.integrations.lora_files import read_lora
from mxdit.models import spec_of
from mxdit.quantize.adapters import tuners, unchanged

pytestmark = pytest.mark.slow

PART = "transformer.blocks.0.attn1.to_q.lora_A.weight"
LINEARS = ["to_q", "net.2", "proj_out"]
# What is done to a LoRA's tensors, and what is then said.
BROKEN = {
    "shape": (
        lambda s: s | {PART: s[PART][:, :-2].clone()},
        r"blocks.0.attn1.to_q.lora_A.weight: the LoRA does not fit the linear; got \(4, 62\); expected \(4, 64\)",
    ),
    "rank": (lambda s: s | {PART: s[PART][:2].clone()}, r"no common rank; got \(64, 4\) and \(2, 64\)"),
    "no rank": (lambda s: {k: t[:0] if "_A" in k else t[:, :0].clone() for k, t in s.items()}, r"no common rank"),
    "NaN": (lambda s: s | {PART: s[PART] / 0 * 0}, r"blocks.0.attn1.to_q.*: the LoRA holds infs or NaNs"),
    "infinity": (lambda s: s | {PART: s[PART] / 0}, r"blocks.0.attn1.to_q.*: the LoRA holds infs or NaNs"),
    "bytes": (lambda s: s | {PART: s[PART].to(torch.int8)}, r"to_q.lora_A.weight: a dtype that no LoRA has"),
    "half": (
        lambda s: {k: t for k, t in s.items() if k != PART},
        r"blocks.0.attn1.to_q.lora_A.weight",
    ),
    "module": (
        lambda s: {k.replace("ks.1", "ks.7"): t for k, t in s.items()},
        r"blocks.7.attn1.to_q: the LoRA changes a module that the model does not have",
    ),
    "no linear": (
        lambda s: {k.replace("1.attn1.to_q", "1.attn1.norm_q"): t for k, t in s.items()},
        r"blocks.1.attn1.norm_q: the LoRA changes no linear; got RMSNorm",
    ),
    "prefix": (
        lambda s: {k.removeprefix("transformer."): t for k, t in s.items()},
        r"there is no LoRA|a tensor that is not the transformer's",
    ),
    "DoRA": (lambda s: s | {PART.replace("A.weight", "magnitude_vector"): torch.ones(64)}, r"a DoRA"),
    "norm": (
        lambda s: s | {"transformer.blocks.0.norm2.lora_diff": torch.ones(64)},
        r"norm2.lora_diff: no tensor of a LoRA",
    ),
}


@pytest.fixture
def pipe() -> WanPipeline:
    made = tiny.pipeline()
    for model in (made.transformer, made.transformer_2):
        mxdit.quantize_(model, "mxfp8")  # whose packed weight has a float weight's shape: the easiest to take for one
    return made


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_changes_nothing(pipe, fault, tmp_path):
    change, message = BROKEN[fault]
    broken = loras.save(tmp_path / "broken.safetensors", change(lora(pipe.transformer)))
    good = loras.save(tmp_path / "good.safetensors", lora(pipe.transformer_2))
    mxdit.load_lora_weights(pipe, {"transformer": good, "transformer_2": good}, "a")
    before = [Untouched(model) for model in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(str(broken), adapter_name="b")
    with pytest.raises(CheckpointError, match=message) as refused:
        mxdit.load_lora_weights(pipe, {"transformer_2": good, "transformer": broken}, "b")
    assert str(broken) in str(refused.value)
    with pytest.raises(CheckpointError) as merging:  # what is not put beside is not merged either, in the same words
        check_fits(read_lora(broken, spec_of(pipe.transformer)), pipe.transformer)
    assert str(merging.value) == str(refused.value)
    for model in before:
        model.check()
    pipe.load_lora_weights(lora(pipe.transformer, seed=3), adapter_name="b")  # and the name is free


def test_what_diffusers_would_drop_is_refused_beside_the_weights_too(pipe, tmp_path):
    state = loras.original(loras.layers(), alpha=4.0)
    state["diffusion_model.blocks.0.self_attn.norm_q.diff"] = torch.ones(64)
    file = loras.save(tmp_path / "lora.safetensors", state)
    before = Untouched(pipe.transformer)
    with pytest.raises(CheckpointError, match=r"norm_q\.diff: diffusers drops this tensor of the LoRA"):
        mxdit.load_lora_weights(pipe, {"transformer": file}, "a")
    before.check()


def test_a_damaged_file_and_names_that_cannot_be(pipe, tmp_path):
    save_file(lora(pipe.transformer), tmp_path / "good.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
    save_file({"diffusion_model.blocks.0.attention.lora_down.weight": torch.ones(2, 64)}, tmp_path / "odd.safetensors")
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    before = [Untouched(model) for model in (pipe.transformer, pipe.transformer_2)]
    good = {"transformer": tmp_path / "good.safetensors"}
    for files, name, error, message in (
        ({"transformer": tmp_path / "cut.safetensors"}, "b", CheckpointError, r"cut.safetensors"),
        ({"transformer": tmp_path / "none.safetensors"}, "b", CheckpointError, r"none.safetensors"),
        ({"transformer": tmp_path / "odd.safetensors"}, "b", CheckpointError, r"cannot convert the file"),
        (good, "a", InputError, r"adapter_name transformer: the name is in use; got 'a'"),
        (good, "a.b", InputError, r"no name for an adapter; got 'a.b'"),
        (good, "", InputError, r"no name for an adapter; got ''"),
        ({}, "b", InputError, r"nothing to load; expected transformer or transformer_2"),
        ({"vae": good["transformer"]}, "b", InputError, r"no such transformer.*got 'vae'"),
    ):
        with pytest.raises(error, match=message):
            mxdit.load_lora_weights(pipe, files, name)
    with pytest.raises(ValueError, match="already in use"):
        pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    for model in before:
        model.check()


def test_a_load_that_fails_midway_is_taken_back(pipe, monkeypatch):
    """Whatever happens inside diffusers or peft: here peft's last step fails, when its layers are in the model."""

    def full(*_: object, **__: object) -> None:
        assert sum(1 for _ in tuners(pipe.transformer)) == 11
        raise MemoryError("no memory is left")

    before = [Untouched(model) for model in (pipe.transformer, pipe.transformer_2)]
    monkeypatch.setattr("peft.set_peft_model_state_dict", full)
    with pytest.raises(MemoryError):
        pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    for model in before:
        model.check()


def test_the_second_expert_takes_the_first_back(pipe, monkeypatch, tmp_path):
    calls, really = [], peft.set_peft_model_state_dict

    def full(model: object, *args: object, **kwargs: object) -> object:
        calls.append(model)
        if model is pipe.transformer_2:
            raise MemoryError("no memory is left")
        return really(model, *args, **kwargs)

    file = loras.save(tmp_path / "a.safetensors", lora(pipe.transformer))
    before = [Untouched(model) for model in (pipe.transformer, pipe.transformer_2)]
    monkeypatch.setattr("peft.set_peft_model_state_dict", full)
    with pytest.raises(MemoryError):
        mxdit.load_lora_weights(pipe, {"transformer": file, "transformer_2": file}, "a")
    assert calls == [pipe.transformer, pipe.transformer_2]
    for model in before:
        model.check()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=LINEARS, use_dora=True), "use_dora=True"),
        (LoraConfig(target_modules=LINEARS, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(target_modules=LINEARS, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(target_modules=LINEARS, bias="all"), "bias='all'"),
        (LoraConfig(target_modules=LINEARS, modules_to_save=["proj_out"]), "modules_to_save="),
        (LoHaConfig(target_modules=LINEARS), "peft_type='LOHA'"),
        (LoKrConfig(target_modules=LINEARS), "peft_type='LOKR'"),
        (IA3Config(target_modules=LINEARS, feedforward_modules=[]), "peft_type='IA3'"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(pipe, config, message):
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    before = Untouched(pipe.transformer)
    with pytest.raises(CheckpointError, match=rf"no plain LoRA.*; got {message}"):
        pipe.transformer.add_adapter(config, "b")
    before.check()


def test_what_a_file_says_of_itself_is_checked(pipe, tmp_path):
    model = pipe.transformer
    said = {f"transformer.{k}": v for k, v in LoraConfig(r=4, target_modules=LINEARS, use_dora=True).to_dict().items()}
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
    save_file(lora(model), tmp_path / "dora.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    before = Untouched(model)
    with pytest.raises(CheckpointError, match="got use_dora=True"):
        pipe.load_lora_weights(str(tmp_path / "dora.safetensors"))
    with pytest.raises(CheckpointError, match="got use_dora=True"):
        mxdit.load_lora_weights(pipe, {"transformer": tmp_path / "dora.safetensors"}, "a")
    before.check()


@pytest.mark.parametrize("kwargs", ({}, {"safe_fusing": True}, {"lora_scale": 0.5}, {"adapter_names": ["a"]}))
def test_packed_weights_are_not_fused(pipe, kwargs):
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    before = Untouched(pipe.transformer)
    with pytest.raises(ModelError, match=r"cannot be fused.* Keep an adapter beside .* --lora transformer=FILE"):
        pipe.fuse_lora(**kwargs)
    before.check()
    assert pipe.num_fused_loras == 0 and pipe.get_active_adapters() == ["a"]
    pipe.unfuse_lora()
    before.check()


def test_an_adapter_of_layers_that_are_not_quantized_is_fused(pipe):
    state = {k: t for k, t in lora(pipe.transformer).items() if "proj_out" in k}
    pipe.load_lora_weights(state, adapter_name="a")
    before = Untouched(pipe.transformer)
    pipe.fuse_lora()
    assert not torch.equal(pipe.transformer.proj_out.base_layer.weight, before.state["proj_out.base_layer.weight"])
    pipe.unfuse_lora()


@pytest.mark.parametrize("safe", (False, True))
def test_peft_itself_cannot_merge(pipe, safe):
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    before = Untouched(pipe.transformer)
    with pytest.raises((ModelError, FormatError), match=r"cannot be fused into a packed weight|taken for a float one"):
        pipe.transformer.blocks[0].attn1.to_q.merge(safe_merge=safe)
    before.check()


def test_peft_itself_makes_no_dora(pipe):
    """Without diffusers' verb in between; mxfp8's codes would pass for a weight of the right shape."""
    before = Untouched(pipe.transformer)
    with pytest.raises(FormatError, match="a packed weight is taken for a float one"), unchanged(pipe):
        inject_adapter_in_model(LoraConfig(target_modules=["to_q"], use_dora=True), pipe.transformer, "a")
    before.check()


def test_a_float_model_is_left_as_diffusers_made_it():
    model = tiny.transformer().bfloat16()
    assert type(model) is WanTransformer3DModel
    model.add_adapter(LoraConfig(r=4, target_modules=LINEARS, use_dora=True))
    model.fuse_lora()
