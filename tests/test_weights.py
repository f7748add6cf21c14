"""`quantize_weight`: the tensors of a quantized linear, whatever device made them, and whoever chose the scales."""

from __future__ import annotations

import pytest
import torch

import mxdit
from mxdit.errors import FormatError
from mxdit.numerics.formats import FORMATS, TensorInfo


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_the_tensors_are_the_format_s_record(method, dtype):
    smooth = FORMATS[method].smooths
    weight, factors = torch.randn(24, 576).to(dtype), torch.rand(576) + 0.5
    parts = mxdit.quantize_weight(weight, method, mul_scale=factors if smooth else None)
    record = FORMATS[method].tensors(24, 576, smooth=smooth)
    assert [(name, TensorInfo.of(part)) for name, part in parts.items()] == list(record.items())
    layer = mxdit.MXLinear.from_weight(weight, None, method=method, mul_scale=factors if smooth else None)
    assert all(torch.equal(parts[name], tensor) for name, tensor in layer.state_dict().items())
    if smooth:
        assert torch.equal(parts["mul_scale"], factors.bfloat16().float())


@pytest.mark.parametrize("method", FORMATS)
def test_an_npu_gives_canonical_bytes(npu, method):
    weight = torch.randn(32, 1024).bfloat16()
    expected = mxdit.quantize_weight(weight, method)
    parts = mxdit.quantize_weight(weight.to("npu"), method)
    assert {part.device.type for part in parts.values()} == {"npu"}
    assert all(torch.equal(part.cpu(), expected[name]) for name, part in parts.items())
    layer = mxdit.MXLinear.from_weight(weight.to("npu"), None, method=method)
    assert (layer.layout == "nz") == (method == "mxfp4_dualscale")
    assert torch.equal(layer.packed().codes.cpu(), expected["weight"])


def test_scales_that_a_search_chose_are_rounded_under():
    weight = torch.randn(8, 64).bfloat16()
    chosen = mxdit.encode(weight, "mxfp4", "ocp").scales
    parts = mxdit.quantize_weight(weight, "mxfp4", scales=chosen)
    assert torch.equal(parts["weight"], mxdit.encode(weight, "mxfp4", "ocp").codes)
    with pytest.raises(FormatError, match="the given scales do not hold the weight"):
        mxdit.quantize_weight(weight, "mxfp4", scales=mxdit.Scales(torch.full_like(chosen.scale, 0xFF)))


def test_a_group_below_what_level_0_holds_is_zeros():
    weight = torch.randn(4, 1024).bfloat16()
    weight[1, 512:] *= 2.0**-130  # below 6 * 2**-126, and finite
    parts = mxdit.quantize_weight(weight, "mxfp4_dualscale")
    zeroed = weight.clone()
    zeroed[1, 512:] = 0
    assert all(
        torch.equal(part, parts[name]) for name, part in mxdit.quantize_weight(zeroed, "mxfp4_dualscale").items()
    )
    assert float(parts["weight_dual_scale"][1, 1]) == 0 and not bool((parts["weight_scale"] == 0xFF).any())


@pytest.mark.parametrize("bad", (torch.inf, -torch.inf, torch.nan))
@pytest.mark.parametrize("method", FORMATS)
def test_numbers_that_are_none_are_refused(method, bad):
    weight = torch.randn(4, 1024).bfloat16()
    weight[2, 700] = bad
    with pytest.raises(FormatError, match=r"holds what .* cannot; got 1 infs or NaNs"):
        mxdit.quantize_weight(weight, method)


def test_a_layer_takes_only_the_tensors_of_its_record():
    layer = mxdit.MXLinear(64, 8, method="mxfp8")
    parts = mxdit.quantize_weight(torch.randn(8, 64), "mxfp8")
    layer.load(parts)
    for name, wrong, what in (
        ("weight", torch.randn(8, 64), r"weight: not a tensor of this mxfp8 layer; got \(8, 64\) float32"),
        ("weight_scale", parts["weight_scale"][:, :1], r"expected \(8, 2\) uint8"),
        ("mul_scale", torch.ones(64), "expected one of weight, weight_scale"),
    ):
        with pytest.raises(FormatError, match=what):
            layer.load({"weight": torch.zeros_like(parts["weight"]), name: wrong})
        assert all(torch.equal(layer.state_dict()[key], part) for key, part in parts.items())
