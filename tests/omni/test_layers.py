"""Single layers of the engine: what comes to them from a checkpoint, what they refuse, and what they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm_omni.platforms import current_omni_platform

import mxdit
from layers import MODEL, building, made
from mxdit.errors import CheckpointError, ConfigError, FormatError, ModelError
from mxdit.integrations.vllm_omni import loading
from mxdit.numerics.formats import PARTS

QKV, UP, DOWN = "blocks.0.attn1.to_qkv", "blocks.0.ffn.net_0.proj", "blocks.0.ffn.net_2"
K, HEADS, WIDE = 64, 8, 576  # WIDE: two groups of 512, the second a short one
PACKED = {"is_checkpoint_serialized": True, "layout": "packed", "version": 1}
KEYS = ("q", "k", "v")


def qkv(method: str, degree: int = 1, rank: int = 0, **keys: Any) -> Any:
    with building(degree=degree, rank=rank):
        return made(QKVParallelLinear, K, 8, HEADS, name=QKV, method=method, keys=keys)


def whole(method: str, smooth: bool = True) -> dict[str, dict[str, Tensor]]:
    """Quantized q, k and v of one `mul_scale`."""
    factors = torch.linspace(0.5, 2, K) if smooth else None
    weights = {key: torch.randn(HEADS * 8, K).bfloat16() for key in KEYS}
    return {
        key: mxdit.quantize_weight(weight, method, rule="ocp", mul_scale=factors) for key, weight in weights.items()
    }


def load(layer: Any, parts: Mapping[str, Tensor], key: str | int | None = None) -> None:
    for name, tensor in parts.items():
        held = getattr(layer, name)
        held.weight_loader(held, tensor, *[key] * (key is not None))


def finish(layer: Any) -> dict[str, Tensor]:
    """What the layer holds once everything was read."""
    layer.quant_method.process_weights_after_loading(layer)
    return {name: getattr(layer, name).data for name in PARTS if getattr(layer, name, None) is not None}


def shards(parts: Mapping[str, Mapping[str, Tensor]], method: str, rank: int, degree: int) -> dict[str, Tensor]:
    held = [mxdit.shard(part, method, "column", rank, degree)[0] for part in parts.values()]
    return {name: held[0][name] if name == "mul_scale" else torch.cat([one[name] for one in held]) for name in held[0]}


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]), name


# -- loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", (1, 5, 1000))
@pytest.mark.parametrize("method", ("mxfp4", "mxfp4_dualscale", "mxfp8"))
def test_rows_come_block_by_block(monkeypatch, method, rows):
    """In blocks that do not divide a rank's rows, the last one is short."""
    monkeypatch.setattr(loading, "BLOCK", rows * K)
    parts = whole(method, smooth=method != "mxfp8")
    layer = qkv(method, 2, 1, **PACKED)
    for key in KEYS:
        load(layer, parts[key], key)
    assert_equal(finish(layer), shards(parts, method, 1, 2))


@pytest.mark.parametrize("rows", (1, 5, 1000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("rank", (0, 1))
@pytest.mark.parametrize("method", ("mxfp4", "mxfp4_dualscale"))
def test_a_float_weight_is_cast_quantized_and_cut(monkeypatch, method, rank, dtype, rows):
    """As a checkpoint of the model's dtype would be. By columns, and inside a group of 512."""
    monkeypatch.setattr(loading, "BLOCK", rows * WIDE)
    weight = torch.randn(48, WIDE, dtype=dtype)
    with building(degree=2, rank=rank):
        layer = made(RowParallelLinear, WIDE, 48, name=DOWN, method=method)
    load(layer, {"weight": weight})
    wanted = mxdit.quantize_weight(weight.bfloat16(), method, rule="ocp")
    assert_equal(finish(layer), mxdit.shard(wanted, method, "row", rank, 2)[0])


def test_q_k_and_v_may_be_one_tensor():
    parts = whole("mxfp4_dualscale")
    layer = qkv("mxfp4_dualscale", 2, 1, **PACKED)
    fused = {name: torch.cat([parts[key][name] for key in KEYS]) for name in parts["q"] if name != "mul_scale"}
    load(layer, {**fused, "mul_scale": parts["q"]["mul_scale"]})
    assert_equal(finish(layer), shards(parts, "mxfp4_dualscale", 1, 2))


def test_a_layer_may_fuse_by_numbers():
    weights = [torch.randn(rows, K).bfloat16() for rows in (32, 64)]
    with building(degree=2, rank=1):
        layer = made(MergedColumnParallelLinear, K, [32, 64], name=UP, method="mxfp8")
    for index, weight in enumerate(weights):
        load(layer, {"weight": weight}, index)
    parts = {str(index): mxdit.quantize_weight(weight, "mxfp8") for index, weight in enumerate(weights)}
    assert_equal(finish(layer), shards(parts, "mxfp8", 1, 2))


def test_a_linear_that_is_not_split_is_whole_on_every_rank():
    weight = torch.randn(32, K).bfloat16()
    with building(degree=2, rank=1):
        layer = made(ReplicatedLinear, K, 32, name=UP, method="mxfp8")
    load(layer, {"weight": weight})
    assert_equal(finish(layer), mxdit.quantize_weight(weight, "mxfp8"))


def test_the_engine_misses_what_a_checkpoint_must_have():
    """A `mul_scale` only where the config says so, and of a float checkpoint nothing but the weight."""
    for keys, optional in (
        ({}, {"weight_scale"}),
        (PACKED, {"mul_scale"}),
        ({**PACKED, "require_smooth_scale": True}, set()),
    ):
        layer = qkv("mxfp4", **keys)
        found = {name for name, held in layer.named_parameters() if getattr(held, "is_checkpoint_optional", False)}
        assert found == optional
        required = {name for name, held in layer.named_parameters() if getattr(held, "is_checkpoint_required", False)}
        assert found | required == {name for name, _ in layer.named_parameters()} and not found & required


def packed(change: Callable[[dict[str, dict[str, Tensor]]], Any], **keys: Any) -> None:
    parts, layer = whole("mxfp4"), qkv("mxfp4", **PACKED, **keys)
    change(parts)
    for key in parts:
        load(layer, parts[key], key)
    layer.quant_method.process_weights_after_loading(layer)


def online(tensors: Mapping[str, Tensor], key: str | None = None) -> None:
    load(qkv("mxfp4"), tensors, key)


WEIGHT = torch.zeros(HEADS * 8, K, dtype=torch.bfloat16)
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "no scale": (
        lambda: packed(lambda parts: [part.pop("weight_scale") for part in parts.values()]),
        r"to_qkv.weight_scale: a quantized linear is not whole; got nothing\.",
    ),
    "no scale of one": (lambda: packed(lambda parts: parts["k"].pop("weight_scale")), "not whole; got nothing for k"),
    "nothing of one": (lambda: packed(lambda parts: parts.pop("v")), "weight: .* not whole; got nothing for v"),
    "mul_scale of two": (
        lambda: packed(lambda parts: parts["k"].pop("mul_scale")),
        "smoothed differently; got one for q, v; expected one for each of q, k, v",
    ),
    "another mul_scale": (
        lambda: packed(lambda parts: parts["v"].update(mul_scale=torch.ones(K))),
        "smoothed differently; got another for v than for",
    ),
    "no mul_scale": (
        lambda: packed(lambda parts: [part.pop("mul_scale") for part in parts.values()], require_smooth_scale=True),
        "no mul_scale, and the config requires one",
    ),
    "codes of another shape": (
        lambda: packed(lambda parts: parts["q"].update(weight=parts["q"]["weight"][:, :-1])),
        r"not a tensor of this mxfp4 layer; got .*\(64, 31\).*; expected .*\(64, 32\)",
    ),
    "too many fused rows": (
        lambda: load(qkv("mxfp4", **PACKED), {"weight": torch.zeros(200, K // 2, dtype=torch.uint8)}),
        "not a tensor of this mxfp4 layer; .* expected 192 rows",
    ),
    "codes for floats": (lambda: online({"weight": WEIGHT.to(torch.float8_e4m3fn)}, "q"), "quantized already"),
    "a scale for nothing": (lambda: online({"weight_scale": WEIGHT}, "q"), "quantized already"),
    "floats of another shape": (
        lambda: online({"weight": WEIGHT[:, 1:]}, "q"),
        r"got .*\(64, 63\).*; expected \(64, 64\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_checkpoint_lacks_or_has_wrong_is_said(case):
    refused, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        refused()


def test_ranks_that_would_hold_the_same_heads_are_refused():
    with building(degree=2, rank=1), pytest.raises(ModelError, match=r"same heads .* parallelism of 2, 1 heads"):
        made(QKVParallelLinear, K, 32, 2, 1, name=QKV, method="mxfp4")


# -- which method, and what it takes ---------------------------------------------------------------------------------------

NAMES: dict[str, type[LinearBase]] = {QKV: QKVParallelLinear, DOWN: RowParallelLinear}


@pytest.mark.parametrize(
    ("pattern", "ignored"),
    [
        ("blocks.0.attn1.to_qkv", {QKV}),
        ("blocks.0.attn1.to_*", {QKV}),
        ("blocks.0.ffn.net_2", {DOWN}),
        ("blocks.0.ffn.net.2", {DOWN}),
        ("*.net_?", {DOWN}),
        ("blocks.0.*", {QKV, DOWN}),
    ],
)
def test_layers_have_names_of_the_engine_and_of_diffusers(pattern, ignored):
    for key in ("ignored_layers", "w4a8_fallback_layers"):
        with building():
            methods = {
                name: made(kind, K, *size, name=name, method="mxfp4", keys={key: [pattern]}).quant_method
                for (name, kind), size in zip(NAMES.items(), ((8, HEADS), (K,)), strict=True)
            }
        found = {name for name, method in methods.items() if getattr(method, "activation", "none") != "mxfp4"}
        assert found == ignored, key


@pytest.mark.parametrize("pattern", [QKV, "blocks.0.attn1.to_[qkv]", "blocks.0.attn1.*"])
@pytest.mark.parametrize(("main", "other"), [("mxfp4", "mxfp8"), ("mxfp8", "mxfp4_dualscale")])
def test_a_layer_has_its_own_method(on_npu, main, other, pattern):
    """Also where the engine has linears of its own: its configs have one method."""
    keys = {"layer_methods": {other: [pattern]}, "activation_steps": {"bf16": [0]} if main == "mxfp4" else None}
    with building():
        made_by = {
            name: made(kind, K, *size, name=name, method=main, keys=keys).quant_method
            for (name, kind), size in zip(NAMES.items(), ((8, HEADS), (K,)), strict=True)
        }
    assert {name: method.method for name, method in made_by.items()} == {QKV: other, DOWN: main}
    assert {type(method).__name__ for method in made_by.values()} == {"MXLinearMethod"}


@pytest.mark.parametrize(("asked", "taken"), [("bf16", ["bf16", "bf16"]), ("mxfp4", ["mxfp4", "mxfp8"])])
def test_at_a_step_a_layer_takes_what_goes_with_its_weight(monkeypatch, asked, taken):
    monkeypatch.setattr("mxdit.integrations.vllm_omni.steps.current_step", lambda where: (0, 4))
    keys = {"layer_methods": {"mxfp8": [DOWN]}, "activation": "mxfp8", "activation_steps": {asked: [0]}}
    with building():
        methods = [
            made(ReplicatedLinear, K, K, name=name, method="mxfp4", keys=keys).quant_method for name in (UP, DOWN)
        ]
    for method in methods:
        method._switch.begin_step()
    assert [method.activation_now() for method in methods] == taken


def test_a_layer_of_two_methods_is_refused():
    keys = {"layer_methods": {"mxfp8": [QKV], "mxfp4_dualscale": ["blocks.0.attn1.to_q"]}}
    with building(), pytest.raises(ConfigError, match=r"a layer has two methods; got 'blocks\.0\.attn1\.to_q'"):
        made(ReplicatedLinear, K, K, name=UP, method="mxfp4", keys=keys)


def test_a_linear_that_diffusers_does_not_have_is_not_quantized():
    with building():
        layer = made(ReplicatedLinear, K, K, name="blocks.0.gate", method="mxfp4")
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


FLUX = {"_class_name": "FluxTransformer2DModel"}


@pytest.fixture
def on_npu(monkeypatch) -> None:
    """The engine says that it runs on one."""
    monkeypatch.setattr(type(current_omni_platform), "is_npu", lambda self: True)


def test_the_engines_own_linears_are_those_that_are_decided_here(on_npu):
    """By keys and names that its own config of this method does not take."""
    keys = {"num_bf16_fallback_layers": 1, "w4a8_fallback_layers": ["blocks.1.*.net.2"]}
    names = ["blocks.0.ffn.net_2", "blocks.1.ffn.net_2", "blocks.1.ffn.net_0.proj"]
    with building():
        methods = [made(ReplicatedLinear, K, K, name=name, method="mxfp4", keys=keys).quant_method for name in names]
    assert [getattr(method, "is_w4a8_fallback_layer", None) for method in methods] == [None, True, False]


def test_dual_scale_with_other_activations_in_a_layer_is_ours(on_npu):
    keys = {"num_bf16_fallback_layers": 0, "w4a8_fallback_layers": [DOWN]}
    with building():
        layer = made(ReplicatedLinear, K, K, name=UP, method="mxfp4_dualscale", keys=keys)
    assert type(layer.quant_method).__name__ == "MXLinearMethod"


def test_a_family_of_unknown_names_has_the_engines_own_linears_on_an_npu(on_npu):
    keys = {"ignored_layers": ["proj.0"]}
    with building(FLUX):
        methods = [
            made(ReplicatedLinear, K, K, name=f"proj.{i}", method="mxfp4", keys=keys).quant_method for i in (0, 1)
        ]
    assert [type(method).__name__ for method in methods] == ["UnquantizedLinearMethod", "NPUMxfp4OnlineLinearMethod"]


def test_a_family_of_unknown_names_is_refused_elsewhere():
    with building(FLUX), pytest.raises(ConfigError, match=r"by which names .* got .*Flux.*runtimes"):
        made(ReplicatedLinear, K, K, name="proj", method="mxfp4")


@pytest.mark.parametrize(("choice", "message"), [("engine", "runs on Ascend NPUs"), ("mine", "auto.*mxdit.*engine")])
def test_linears_that_cannot_answer_are_refused(monkeypatch, choice, message):
    monkeypatch.setenv("MXDIT_VLLM_OMNI", choice)
    with building(MODEL), pytest.raises(ConfigError, match=message):
        made(ColumnParallelLinear, K, WIDE, name=UP, method="mxfp4")


@pytest.mark.parametrize("activation", ("mxfp4", "mxfp8", "bf16"))
def test_activations_may_be_fp32_but_not_whole_numbers(activation):
    """Where a scheme takes halves only, they are rounded to BF16 first, as `mxdit.MXLinear` rounds them."""
    weight, x, bias = torch.randn(32, K).bfloat16(), torch.randn(3, K), torch.randn(32)
    with building():
        layer = made(
            ColumnParallelLinear, K, 32, name=UP, method="mxfp4", keys={"mxfp4_scale_alg": 2, "activation": activation}
        )
    load(layer, {"weight": weight})
    for _ in range(2):  # a second time changes nothing
        layer.quant_method.process_weights_after_loading(layer)
    definition = mxdit.MXLinear(K, 32, method="mxfp4", activation=activation, rule="uos")
    definition.load(mxdit.quantize_weight(weight, "mxfp4", rule="uos"))
    definition.bias = torch.nn.Parameter(bias, requires_grad=False)
    with torch.no_grad():
        for given in (x, x.half(), x.bfloat16()):
            found, wanted = layer.quant_method.apply(layer, given, bias), definition(given)
            assert found.dtype == given.dtype and torch.equal(found, wanted)
    with pytest.raises(FormatError, match=f"^{UP}: .* no scheme takes; got torch.int8"):
        layer.quant_method.apply(layer, x.to(torch.int8))
