"""LoRAs trained beside quantized linears: gradients against float64, and what is saved is what was trained."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import mxdit
import tiny
from adapted import smoothed
from mxdit.layers import MXLinear
from mxdit.quantize.adapters import tuners

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "net.0.proj", "net.2"], init_lora_weights=False)


def adapted(method: str, *, smooth: bool = False) -> torch.nn.Module:
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, {"quant_method": method, "num_bf16_fallback_layers": 0})
    if smooth:
        smoothed(model, method)
    model.requires_grad_(False)
    torch.manual_seed(0)
    model.add_adapter(CONFIG)
    return model


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 2, 8, 8, generator=generator).bfloat16()
    text = torch.randn(2, 6, tiny.TEXT_DIM, generator=generator).bfloat16()
    return model(latents, torch.tensor([999.3, 500.0]), text).sample.float().square().mean()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("method", "smooth"), [("mxfp4", False), ("mxfp4", True), ("mxfp4_dualscale", True), ("mxfp8", False)]
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients_are_those_of_the_decoded_weight(method, smooth, dtype):
    """In float64, of ``(x * mul_scale) @ decoded.T + bias + scale * (x @ A.T) @ B.T``; the adapter in `dtype`."""
    layer = adapted(method, smooth=smooth).blocks[0].ffn.net[2]
    base, down, up = layer.base_layer, layer.lora_A["default"].to(dtype), layer.lora_B["default"].to(dtype)
    assert isinstance(base, MXLinear) and base.in_features == 576
    x = torch.randn(2, 7, 576).bfloat16().requires_grad_()
    grad = torch.randn(2, 7, 64).bfloat16()
    got = torch.autograd.grad(layer(x), (x, down.weight, up.weight), grad)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, down.weight, up.weight)]
    weight = mxdit.decode(base.packed(), torch.float32).double()
    scale = 1.0 if base.mul_scale is None else base.mul_scale.double()
    y = (exact[0] * scale) @ weight.T + 2.0 * (exact[0] @ exact[1].T) @ exact[2].T
    want = torch.autograd.grad(y, exact, grad.double())
    # x's is a sum of two bf16 products; the adapter's are products of bf16 numbers in its own dtype.
    limits = [2**-7, *[2**-20 if dtype is torch.float32 else 2**-6] * 2]
    for mine, right, limit in zip(got, want, limits, strict=True):
        assert mine.shape == right.shape and float((mine.double() - right).norm() / right.norm()) < limit


@pytest.mark.parametrize("method", ("mxfp4", "mxfp8"))
def test_only_the_adapter_is_trained_and_checkpointing_changes_nothing(method):
    model = adapted(method)
    packed = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    loss_of(model).backward()
    parameters = trained(model)
    assert len(parameters) == 2 * sum(1 for _ in tuners(model)) and all("lora_" in name for name in parameters)
    plain = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    assert all(grad.dtype == torch.float32 and float(grad.abs().sum()) > 0 for grad in plain.values())

    model.zero_grad()
    model.train()
    model.enable_gradient_checkpointing()
    loss_of(model).backward()
    for name, parameter in parameters.items():
        assert torch.equal(parameter.grad, plain[name]), name
    for name, tensor in packed.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_is_trained_is_saved_and_loaded(tmp_path):
    pipe = tiny.pipeline()
    mxdit.quantize_(pipe.transformer, "mxfp4")
    plain = tiny.forward(pipe.transformer)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(CONFIG)
    optimizer = torch.optim.AdamW(trained(pipe.transformer).values(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(pipe.transformer)
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]

    pipe.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    for name, parameter in trained(pipe.transformer).items():
        parameter.data = parameter.data.bfloat16()  # as adapters are held that are loaded
        assert "lora" in name
    want = tiny.forward(pipe.transformer)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.forward(pipe.transformer), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert torch.equal(tiny.forward(pipe.transformer), want) and not torch.equal(want, plain)
