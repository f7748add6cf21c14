"""What a host does to its guests: one test for each thing that would break this one; the contract a new diffusers must keep."""

import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

import mxdit
import tiny
from mxdit import MXConfig, MXLinear


def test_trap_the_method_is_an_enum_that_is_its_name(source, method):
    """The host reads `.value`, looks the method up by it, and writes it to JSON."""
    config = tiny.load(source / "transformer", MXConfig(method)).hf_quantizer.quantization_config
    assert config.quant_method.value == config.quant_method == method
    assert json.dumps({"m": config.quant_method}) == json.dumps({"m": method})


def test_trap_configs_are_printed(source):
    config = mxdit.pipeline_config("mxfp4")
    WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config)
    assert "mxfp4" in repr(config)


def test_trap_configs_may_be_dictionaries(source):
    online = tiny.load(source / "transformer", {"quant_method": "mxfp4", "ignored_layers": ["blocks.0.*"]})
    assert len(mxdit.report_of(online).quantized) == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trap_float_dtypes_are_those_of_stock_diffusers(source, stored, method, dtype):
    """What is not quantized has the dtype that it would have without mxdit, norms and tables in float32 among them."""
    stock = {name: p.dtype for name, p in tiny.load(source / "transformer", dtype=dtype).named_parameters()}
    for model in (tiny.load(source / "transformer", MXConfig(method), dtype), tiny.load(stored, dtype=dtype)):
        assert model.dtype == dtype
        floats = dict(model.named_parameters())
        assert {name: p.dtype for name, p in floats.items()} == {name: stock[name] for name in floats}
        assert tiny.forward(model).dtype == dtype and torch.isfinite(tiny.forward(model)).all()
    assert stock["blocks.0.scale_shift_table"] == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trap_scales_are_not_cast(source, stored, method, dtype):
    """The host casts every float tensor that it reads; a rounded level-0 scale is another model."""
    exact = WanTransformer3DModel.from_pretrained(stored)
    for path, module in tiny.load(stored, dtype=dtype).named_modules():
        if isinstance(module, MXLinear):
            for name, buffer in module.named_buffers():
                assert buffer.dtype == exact.get_submodule(path).get_buffer(name).dtype
                assert torch.equal(buffer, exact.get_submodule(path).get_buffer(name))
    if method == "mxfp4_dualscale":
        assert exact.blocks[0].ffn.net[2].weight_dual_scale.dtype == torch.float32


def test_trap_the_timestep_is_cast_to_the_first_parameter(stored):
    """A uint8 Parameter would make 231 of the timestep 999.3."""
    assert all(
        parameter.is_floating_point() for parameter in WanTransformer3DModel.from_pretrained(stored).parameters()
    )


def test_trap_the_class_is_left_as_it_was(source, method):
    before = list(WanTransformer3DModel._keep_in_fp32_modules)
    tiny.load(source / "transformer", MXConfig(method))
    assert WanTransformer3DModel._keep_in_fp32_modules == before


def test_trap_without_a_dtype(source, stored, tmp_path, method):
    """Online it means bfloat16; of a quantized checkpoint, whatever it was saved in, and not float32."""
    assert tiny.load(source / "transformer", MXConfig(method), dtype=None).dtype == torch.bfloat16
    half = tiny.load(source / "transformer", MXConfig(method), dtype=torch.float16)
    half.save_pretrained(tmp_path)
    assert tiny.same(tiny.load(tmp_path, dtype=None), half)


def test_trap_buffers_move_with_the_model(stored):
    model = WanTransformer3DModel.from_pretrained(stored)
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_trap_a_loaded_model_refuses_a_cast(stored):
    with pytest.raises(ValueError, match=r"Casting a quantized model"):
        WanTransformer3DModel.from_pretrained(stored).to(torch.float16)


def test_trap_parallel_loading_is_declined(source, tmp_path, monkeypatch, method):
    """Shards read at once would each hold a tensor in BF16."""
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes")
    tiny.load(source / "transformer").save_pretrained(tmp_path, max_shard_size="50KB")
    model = tiny.load(tmp_path, MXConfig(method))
    assert not model.hf_quantizer.supports_parallel_loading
    assert tiny.same(model, tiny.load(source / "transformer", MXConfig(method)))
