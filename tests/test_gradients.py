"""Gradients through a quantized linear: those of the decoded layer, with the rounding of activations taken for the identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mxdit
import tiny
from mxdit.numerics.formats import FORMATS, SCHEMES, scheme_for

PAIRS = [(method, row.activation) for row in SCHEMES.values() for method in row.weights]


def layer_of(method: str, activation: str, *, smooth: bool = False) -> mxdit.MXLinear:
    weight, bias = torch.randn(48, 576).bfloat16(), torch.randn(48).bfloat16()
    mul_scale = torch.rand(576) + 0.5 if smooth else None
    return mxdit.MXLinear.from_weight(weight, bias, method=method, activation=activation, mul_scale=mul_scale)


def decoded(layer: mxdit.MXLinear, x: torch.Tensor) -> torch.Tensor:
    """What autograd sees: the float product, with the layer's own weight."""
    weight = mxdit.decode(layer.packed(), x.dtype)
    if layer.mul_scale is not None:
        x = x * layer.mul_scale.to(x.dtype)
    return nn.functional.linear(x, weight, layer.bias.to(x.dtype))


@pytest.mark.parametrize(("method", "activation"), PAIRS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("smooth", (False, True))
def test_the_gradient_is_the_decoded_layer_s(method, activation, dtype, smooth):
    if smooth and not FORMATS[method].smooths:
        with pytest.raises(mxdit.FormatError, match="takes no mul_scale"):
            layer_of(method, activation, smooth=True)
        return
    layer = layer_of(method, activation, smooth=smooth)
    x = torch.randn(2, 3, 576).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, 48).to(dtype)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(y, layer(x))  # the same numbers as without a gradient
    (got,) = torch.autograd.grad(y, x, grad)

    inside = x.dtype if x.dtype in scheme_for(method, activation).output_dtypes(method) else torch.bfloat16
    same = x.detach().to(inside).requires_grad_()
    (want,) = torch.autograd.grad(decoded(layer, same), same, grad.to(inside))
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_a_bias_that_wants_a_gradient_gets_one():
    layer = layer_of("mxfp4", "mxfp4")
    layer.bias.requires_grad_()
    grad = torch.randn(2, 3, 48).bfloat16()
    layer(torch.randn(2, 3, 576).bfloat16()).backward(grad)
    assert torch.equal(layer.bias.grad, grad.flatten(0, 1).sum(0))


def test_activations_of_one_axis_have_gradients():
    layer, x = layer_of("mxfp4", "mxfp4"), torch.randn(576).bfloat16().requires_grad_()
    layer.bias.requires_grad_()
    grad = torch.randn(48).bfloat16()
    layer(x).backward(grad)
    assert x.grad.shape == (576,) and torch.equal(layer.bias.grad, grad)


def test_an_adapter_beside_the_layer_learns_what_it_would_beside_the_decoded_one():
    layer, x = layer_of("mxfp4_dualscale", "bf16"), torch.randn(4, 576).bfloat16()
    down, up = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((576, 4), (4, 48)))
    first = torch.randn(576, 576).bfloat16().requires_grad_()  # an adapter before it learns through it
    for product in (layer, lambda h: decoded(layer, h)):
        h = x @ first
        (product(h) + h @ down @ up).square().sum().backward()
        grads = [t.grad.clone() for t in (first, down, up)]
        if product is layer:
            ours = grads
        for t in (first, down, up):
            t.grad = None
    for mine, other in zip(ours, grads, strict=True):
        assert torch.nn.functional.cosine_similarity(mine.flatten().float(), other.flatten().float(), 0) > 0.9999


def test_gradients_reach_the_input_of_a_quantized_transformer():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    latents = torch.randn(1, 16, 2, 8, 8).bfloat16().requires_grad_()
    text = torch.randn(1, 6, tiny.TEXT_DIM).bfloat16().requires_grad_()
    model(latents, torch.tensor([999.3]), text).sample.float().square().sum().backward()
    assert float(latents.grad.abs().sum()) > 0 and float(text.grad.abs().sum()) > 0


@pytest.mark.slow
def test_a_compiled_layer_has_the_same_gradient():
    layer, x = layer_of("mxfp4", "mxfp4"), torch.randn(4, 576).bfloat16()
    grads = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        call(leaf).float().square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
