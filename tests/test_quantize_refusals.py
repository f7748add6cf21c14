"""Models that quantize_ refuses, with nothing changed: other modules than their config makes, weights that are elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel, WanTransformer3DModel
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune as pruning

import mxdit
import tiny
from mxdit import CheckpointError, ModelError, MXConfig

UNLOAD = r"It has adapters: before quantizing, call unload_lora_weights\(\)"
LORA = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)


def with_adapter(config: LoraConfig | LoHaConfig = LORA) -> WanTransformer3DModel:
    model = tiny.transformer().bfloat16()
    model.add_adapter(config)
    return model


def refused(model: nn.Module, message: str) -> None:
    """quantize_ says `message`, and the model is as it was."""
    kinds, config = [type(module) for module in model.modules()], dict(model.config)
    with pytest.raises(ModelError, match=message):
        mxdit.quantize_(model, "mxfp4")
    assert [type(module) for module in model.modules()] == kinds and dict(model.config) == config


def test_adapters_are_not_quantized():
    refused(with_adapter(), rf"base_layer.* besides\. {UNLOAD}")
    refused(with_adapter(LoHaConfig(r=4, target_modules=["ffn.net.2"])), UNLOAD)
    fused = with_adapter()
    fused.fuse_lora()
    refused(fused, UNLOAD)


def test_a_fused_and_unloaded_adapter_is_part_of_the_weights(tmp_path):
    pipe = tiny.pipeline()
    before = pipe.transformer.blocks[0].attn1.to_q.weight.clone()
    pipe.transformer.add_adapter(LORA)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    model = pipe.transformer
    assert not torch.equal(model.blocks[0].attn1.to_q.weight, before)
    expected = mxdit.encode(model.blocks[0].attn1.to_q.weight, "mxfp4")
    mxdit.quantize_(model, "mxfp4")
    assert torch.equal(model.blocks[0].attn1.to_q.weight, expected.codes)
    model.save_pretrained(tmp_path)
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("overrides", [{}, {"added_kv_proj_dim": 64, "image_dim": 32}])
def test_fused_projections_are_refused_until_unfused(overrides, tmp_path):
    model, plain = (tiny.transformer(**overrides).bfloat16() for _ in range(2))
    for attention in (block.attn1 for block in model.blocks):
        attention.fuse_projections()
    refused(model, r"attn1.to_qkv.* It has fused projections: before quantizing, call unfuse_qkv_projections\(\)")
    model.unfuse_qkv_projections()
    mxdit.quantize_(model, "mxfp4")
    mxdit.quantize_(plain, "mxfp4")
    assert tiny.same(model, plain)


def shorten(model: WanTransformer3DModel) -> None:
    model.blocks = model.blocks[:1]


def replace_norm(model: WanTransformer3DModel) -> None:
    model.blocks[0].norm2 = nn.RMSNorm(64)


def resize(model: WanTransformer3DModel) -> None:
    model.blocks[0].ffn.net[2] = nn.Linear(512, 64)


def drop_bias(model: WanTransformer3DModel) -> None:
    model.proj_out = nn.Linear(64, 64, bias=False)


def parametrize(model: WanTransformer3DModel) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].ffn.net[2])


def prune(model: WanTransformer3DModel) -> None:
    pruning.random_unstructured(model.blocks[0].ffn.net[2], "weight", 0.5)


def compile_block(model: WanTransformer3DModel) -> None:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")


class Scaled(nn.Linear):
    """A linear that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def subclass(model: WanTransformer3DModel) -> None:
    model.blocks[0].ffn.net[2] = Scaled(576, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shorten,
            r"config makes; got no blocks.1, blocks.1.norm1 and \d+ more. Quantize it as from_pretrained gives it",
        ),
        (replace_norm, r"blocks.0.norm2: a module is not the one.*got torch.*RMSNorm; expected FP32LayerNorm"),
        (resize, r"blocks.0.ffn.net.2.weight: a tensor is not the one.*got \(64, 512\); expected \(64, 576\)"),
        (drop_bias, r"proj_out.bias: a tensor is not the one.*got none; expected \(64,\)"),
        (
            parametrize,
            r"parametrized weights: before quantizing, call torch.nn.utils.parametrize.remove_parametrizations",
        ),
        (prune, r"blocks.0.ffn.net.2.weight: a tensor is not the one"),
        (compile_block, r"compiled parts: before quantizing, put their _orig_mod back"),
        (subclass, r"blocks.0.ffn.net.2: a module is not the one.*Scaled; expected Linear"),
    ],
)
def test_other_modules_than_the_config_makes(change: Callable[[WanTransformer3DModel], None], message):
    model = tiny.transformer().bfloat16()
    change(model)
    refused(model, message)


def test_a_class_that_its_config_does_not_build():
    class Finetuned(WanTransformer3DModel):
        def __init__(self, depth: int):
            super().__init__(num_attention_heads=2, attention_head_dim=32, ffn_dim=576, num_layers=depth)

    refused(Finetuned(2).bfloat16(), r"Finetuned: the model cannot be built from its own config.*got TypeError")


def test_a_saved_model_with_adapters_says_so(tmp_path):
    """Layers that are not quantized take adapters; what is then saved could not be loaded, and is refused or named."""
    tiny.transformer().bfloat16().save_pretrained(tmp_path / "bf16")
    online, memory = tiny.load(tmp_path / "bf16", MXConfig("mxfp4")), tiny.load(tmp_path / "bf16")
    mxdit.quantize_(memory, "mxfp4")
    for model in (online, memory):
        model.add_adapter(LoraConfig(r=4, target_modules=["proj_out"]))
    with pytest.raises(ModelError, match=r"proj_out.base_layer.* It has adapters: before saving, call unload_lora"):
        online.save_pretrained(tmp_path / "online")
    online.unload_lora()
    online.save_pretrained(tmp_path / "unloaded")
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path / "unloaded"), online)
    memory.save_pretrained(tmp_path / "memory")  # diffusers saves it without asking
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint.* It has adapters: before saving, call"):
        WanTransformer3DModel.from_pretrained(tmp_path / "memory")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"got DataParallel\. It holds one: pass its module\."),
        (lambda model: get_peft_model(model, LORA), r"got PeftModel\. It holds one: pass its base_model.model\."),
        (
            lambda model: UNet2DModel(sample_size=8, block_out_channels=(32,) * 4),
            r"got UNet2DModel\. .*infer_spec proposes a ModelSpec",
        ),
    ],
)
def test_the_hint_fits_what_was_passed(wrap, message):
    """Only a pipeline is told to pass its transformer."""
    model = wrap(tiny.transformer())
    for call in (lambda: mxdit.quantize_(model, "mxfp4"), lambda: mxdit.plan(model, "mxfp4")):
        with pytest.raises(ModelError, match=message) as caught:
            call()
        assert "pipeline" not in str(caught.value)
