"""load_state_dict on quantized layers and models: what is not theirs is refused before anything is copied."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mxdit
import tiny
from mxdit import FormatError, MXConfig, MXLinear
from mxdit.numerics.formats import FORMATS

LAYER = "blocks.1.ffn.net.2"
assign = pytest.mark.parametrize("assign", [False, True])
strict = pytest.mark.parametrize("strict", [False, True])


def layer(method: str, smooth: bool = False) -> MXLinear:
    scale = torch.rand(64) + 0.5 if smooth else None
    return MXLinear.from_weight(
        torch.randn(8, 64).bfloat16(), torch.randn(8).bfloat16(), method=method, mul_scale=scale
    )


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@assign
@strict
@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_no_dtype_but_its_own(method, dtype, strict, assign):
    """Of one shape with the codes or scales, so that torch would cast them."""
    m = layer(method)
    before = copied(m)
    for name in ("weight", "weight_scale"):
        state = {**copied(layer(method)), name: torch.ones_like(before[name], dtype=dtype)}
        with pytest.raises(
            FormatError,
            match=rf"^{name}: not a tensor of this {method} layer; got .*{str(dtype).removeprefix('torch.')}; expected",
        ):
            m.load_state_dict(state, strict=strict, assign=assign)
    assert unchanged(m, before)


@assign
@strict
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(weight=s["weight"][:, :16]), r"^0.weight: .*got \(8, 16\) uint8; expected \(8, 32\)"),
        (lambda s: s.update(weight_scale=s["weight_scale"].T), r"^0.weight_scale: .*got \(2, 8\)"),
        (
            lambda s: s.update(weight_dual_scale=s["weight_dual_scale"].half()),
            r"^0.weight_dual_scale: .*float16; expected \(8, 1, 1\) float32",
        ),
        (lambda s: s.update(weight_dual_scale=s["weight_dual_scale"][..., 0]), r"^0.weight_dual_scale: .*got \(8, 1\)"),
        (lambda s: s.update(mul_scale=torch.ones(64).bfloat16()), r"^0.mul_scale: .*got \(64,\) bfloat16"),
        (lambda s: s.pop("mul_scale"), r"^0.mul_scale: the weight comes without the multipliers"),
    ],
)
def test_no_part_but_its_own(change: Callable[[dict[str, Tensor]], object], message, strict, assign):
    m = nn.Sequential(layer("mxfp4_dualscale", smooth=True))
    before, state = copied(m), copied(layer("mxfp4_dualscale", smooth=True))
    change(state)
    with pytest.raises(FormatError, match=message):
        m.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, strict=strict, assign=assign)
    assert unchanged(m, before)


@strict
@pytest.mark.parametrize("method", FORMATS)
def test_no_multipliers_that_it_has_no_place_for(method, strict):
    m = layer(method)
    before = copied(m)
    with pytest.raises(FormatError, match=r"^mul_scale: not a tensor of this .* layer; .*; expected one of weight"):
        m.load_state_dict({**copied(layer(method)), "mul_scale": torch.ones(64)}, strict=strict)
    assert unchanged(m, before)


def quantized(directory, method: str, online: bool):
    tiny.transformer().bfloat16().save_pretrained(directory)
    if online:
        return tiny.load(directory, MXConfig(method))
    model = tiny.load(directory)
    mxdit.quantize_(model, method)
    return model


@pytest.mark.parametrize("online", [False, True])
def test_a_float_model_is_refused_before_anything_is_copied(online, tmp_path):
    """mxfp8: a float weight has the shape of the codes. What stands before the first quantized layer is not copied either."""
    model = quantized(tmp_path, "mxfp8", online)
    before, floats = copied(model), tiny.transformer(seed=3).bfloat16().state_dict()
    for kind in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model, backend="eager")):
        prefix = "" if isinstance(kind, type(model)) else "_orig_mod."
        with pytest.raises(
            FormatError, match=r"blocks.0.attn1.to_q.weight: .*Loading does not quantize: load floats into"
        ):
            kind.load_state_dict({f"{prefix}{name}": tensor for name, tensor in floats.items()}, strict=False)
        assert unchanged(getattr(kind, "_orig_mod", kind), before)


@assign
@pytest.mark.parametrize("method", FORMATS)
def test_what_a_quantized_model_saved_is_taken(method, assign):
    """Whole, and in parts that need not end where a layer does."""
    model, other = (tiny.transformer(seed=seed).bfloat16() for seed in (0, 3))
    for each in (model, other):
        mxdit.quantize_(each, method)
    state = copied(other)
    names = list(state)
    cut = names.index(f"{LAYER}.weight_scale")
    for part in (names[:cut], names[cut:]):
        assert not unchanged(model, state)
        model.load_state_dict({name: state[name] for name in part}, strict=False, assign=assign)
    assert unchanged(model, state)
    assert torch.equal(tiny.forward(model), tiny.forward(other))
