"""What torch.compile made of a model is as good as the model, before its first call and after."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

import mxdit
import tiny


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_model_is_quantized_and_set_like_the_model_itself(tmp_path):
    model, plain = (tiny.transformer().bfloat16() for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    floats = tiny.forward(compiled)
    assert torch.equal(floats, tiny.forward(plain))
    assert mxdit.plan(compiled, "mxfp4") == mxdit.plan(plain, "mxfp4")

    assert mxdit.quantize_(compiled, "mxfp4") == mxdit.quantize_(plain, "mxfp4")
    assert tiny.same(model, plain)
    four = tiny.forward(compiled)  # the graph of the float model would give `floats`
    assert torch.equal(four, tiny.forward(plain)) and not torch.equal(four, floats)

    for each in (compiled, plain):
        mxdit.set_activation(each, "mxfp8", layers=["blocks.1.*"])
    assert mxdit.report_of(compiled) == mxdit.report_of(plain)
    assert model.config.quantization_config == plain.config.quantization_config
    eight = tiny.forward(compiled)
    assert torch.equal(eight, tiny.forward(plain)) and not torch.equal(eight, four)

    compiled.save_pretrained(tmp_path)
    assert tiny.same(WanTransformer3DModel.from_pretrained(tmp_path), plain)


@pytest.mark.slow
def test_a_model_compiled_in_place():
    model, plain = (tiny.transformer().bfloat16() for _ in range(2))
    model.compile(backend="eager")
    tiny.forward(model)
    mxdit.quantize_(model, "mxfp4")
    mxdit.quantize_(plain, "mxfp4")
    assert torch.equal(tiny.forward(model), tiny.forward(plain))
