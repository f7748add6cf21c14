"""MXLinear: what it computes, what it keeps, and how hosts may treat it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import mxdit
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FORMATS

OPS = torch.ops.mxdit
CASES = [
    ("mxfp4", "mxfp4", "w4a4"),
    ("mxfp4", "mxfp8", "w4a8"),
    ("mxfp4", "bf16", "w4a16"),
    ("mxfp4_dualscale", "mxfp4", "w4a4"),
    ("mxfp4_dualscale", "mxfp8", "w4a8"),
    ("mxfp4_dualscale", "bf16", "w4a16"),
    ("mxfp8", "mxfp8", "w8a8"),
    ("mxfp8", "bf16", "w8a16"),
]
case = pytest.mark.parametrize(("method", "activation", "scheme"), CASES)
method = pytest.mark.parametrize("method", FORMATS)


def layer(method: str, activation: str | None = None, k: int = 1056, n: int = 20, smooth: bool = True) -> MXLinear:
    scale = torch.rand(k) + 0.5 if smooth and FORMATS[method].smooths else None
    weight, bias = torch.randn(n, k).bfloat16() * 0.1, torch.randn(n).bfloat16()
    return MXLinear.from_weight(weight, bias, method=method, activation=activation, mul_scale=scale)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        left[name].dtype is right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_forward_is_the_quantized_product(method, activation, scheme, dtype):
    x, m = torch.randn(2, 3, 1056).to(dtype), layer(method, activation)
    assert m.scheme == scheme and m.activation == activation
    y = m(x)
    assert y.shape == (2, 3, 20) and y.dtype is dtype

    # fp32 has no operator for these; the layer says that it computes them in bf16
    compute = (
        torch.bfloat16
        if dtype is torch.float32 and (scheme == "w4a8" or (m.weight_dual_scale is not None and scheme == "w4a4"))
        else dtype
    )
    x = x.to(compute)
    x = x if m.mul_scale is None else x * m.mul_scale.to(compute)
    formats = {"w4a4": method, "w4a8": "mxfp8", "w8a8": "mxfp8"}
    if scheme in formats:
        x = mxdit.decode(mxdit.encode(x, formats[scheme]))
    outer = None if m.weight_dual_scale is None else m.weight_dual_scale.squeeze(-1)
    weight = mxdit.decode(mxdit.Packed(m.weight, m.weight_scale, outer, method))
    assert m.bias is not None
    exact = x.double() @ weight.double().T + m.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(compute).eps, atol=1e-4)


@method
def test_from_weight_is_the_codec(method):
    weight = torch.randn(20, 1056).bfloat16()
    m = MXLinear.from_weight(weight, None, method=method)
    packed = mxdit.encode(weight, method)
    assert m.bias is None and torch.equal(m.weight, packed.codes) and torch.equal(m.weight_scale, packed.scale)
    assert (packed.outer is None) == (m.weight_dual_scale is None)
    if packed.outer is not None and m.weight_dual_scale is not None:
        assert m.weight_dual_scale.shape == (20, 3, 1) and torch.equal(m.weight_dual_scale.squeeze(-1), packed.outer)
    wide = MXLinear.from_weight(weight.float(), None, method=method)
    assert same_state(m, wide)  # bf16 values held in fp32 quantize alike, in the dual format through bf16


def test_the_rule_is_the_weights_and_the_four_bit_activations():
    weight, x = torch.randn(8, 64).bfloat16(), torch.randn(5, 64).bfloat16() * 1.3
    for rule in FORMATS["mxfp4"].rules:
        m = MXLinear.from_weight(weight, None, method="mxfp4", rule=rule)
        assert torch.equal(m.weight_scale, mxdit.encode(weight, "mxfp4", rule).scale)
        a = mxdit.encode(x, "mxfp4", rule)
        expected = OPS.matmul(a.codes, a.scale, m.weight, m.weight_scale, None, "mxfp4", "mxfp4", torch.bfloat16)
        assert torch.equal(m(x), expected)
        m.activation = "mxfp8"  # eight-bit activations are always ocp
        a = mxdit.encode(x, "mxfp8", "ocp")
        expected = OPS.matmul(a.codes, a.scale, m.weight, m.weight_scale, None, "mxfp8", "mxfp4", torch.bfloat16)
        assert torch.equal(m(x), expected)
    m = MXLinear.from_weight(weight, None, method="mxfp8", rule="cublas")
    assert torch.equal(m.weight_scale, mxdit.encode(weight, "mxfp8", "cublas").scale)
    assert torch.equal(
        m(x), MXLinear.from_weight(mxdit.decode(mxdit.encode(weight, "mxfp8", "cublas")), None, method="mxfp8")(x)
    )


def test_defaults():
    assert (layer("mxfp4").rule, layer("mxfp4").activation) == ("uos", "mxfp4")
    assert (layer("mxfp4_dualscale").rule, layer("mxfp4_dualscale").activation) == ("ocp", "mxfp4")
    assert (layer("mxfp8").rule, layer("mxfp8").activation) == ("ocp", "mxfp8")


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale"])
def test_activation_changes_on_the_fly_and_the_weight_stays(method):
    m, x = layer(method), torch.randn(4, 1056).bfloat16()
    before = copy.deepcopy(m)
    results = {}
    for activation in ("bf16", "mxfp8", "mxfp4"):
        m.activation = activation
        results[activation] = m(x)
    assert same_state(m, before) and torch.equal(results["mxfp4"], before(x))
    error = {name: float((y - results["bf16"]).float().norm()) for name, y in results.items()}
    assert 0 < error["mxfp8"] < error["mxfp4"] / 2


@case
def test_any_view_of_the_same_tokens(method, activation, scheme):
    m = layer(method, activation, k=64)
    base = torch.randn(5, 64, 6).bfloat16()
    x = base.transpose(1, 2)
    assert not x.is_contiguous()
    y = m(x)
    assert torch.equal(y, m(x.contiguous())) and torch.equal(y, m(x.reshape(30, 64)).view(5, 6, 20))
    assert torch.equal(m(x[2, 3]), y[2, 3]) and m(x[2, 3]).shape == (20,)
    assert m(x[:0]).shape == (0, 6, 20) and m(x[:, :0]).dtype is torch.bfloat16


@method
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: nn.Sequential(m).half()[0]],
)
def test_casts_reach_the_bias_and_nothing_else(method, cast):
    m = layer(method)
    before = copy.deepcopy(m)
    m = cast(m)
    assert m.bias.dtype in (torch.float16, torch.bfloat16)
    m.bias, before.bias = None, None
    assert same_state(m, before)
    for name in ("weight_dual_scale", "mul_scale"):
        assert getattr(m, name) is None or getattr(m, name).dtype is torch.float32


@method
def test_device_moves_take_everything_along(method):
    m = layer(method).to("meta")
    assert {t.device.type for t in [*m.parameters(), *m.buffers()]} == {"meta"}
    assert m(torch.randn(3, 1056, device="meta").bfloat16()).shape == (3, 20)
    back = m.to_empty(device="cpu").to(torch.float16)
    assert {t.device.type for t in back.state_dict().values()} == {"cpu"}
    assert back.weight_dual_scale is None or back.weight_dual_scale.dtype is torch.float32


@method
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_state_dict_round_trip(method, assign, device):
    m, x = layer(method), torch.randn(4, 1056).bfloat16()
    fresh = MXLinear(1056, 20, method=method, smooth=m.mul_scale is not None, device=device, dtype=torch.bfloat16)
    if device == "meta" and not assign:
        fresh = fresh.to_empty(device="cpu")
    stream = io.BytesIO()
    torch.save(m.state_dict(), stream)
    stream.seek(0)
    assert not any(fresh.load_state_dict(torch.load(stream, weights_only=True), assign=assign))
    assert same_state(m, fresh) and torch.equal(fresh(x), m(x))


def test_state_dict_is_canonical():
    state = {name: (tuple(t.shape), t.dtype) for name, t in layer("mxfp4_dualscale").state_dict().items()}
    assert state == {
        "weight": ((20, 528), torch.uint8),
        "weight_scale": ((20, 33), torch.uint8),
        "weight_dual_scale": ((20, 3, 1), torch.float32),
        "mul_scale": ((1056,), torch.float32),
        "bias": ((20,), torch.bfloat16),
    }
    assert list(layer("mxfp4", k=64).state_dict()) == ["bias", "weight", "weight_scale", "mul_scale"]
    assert list(layer("mxfp8", k=64).state_dict()) == ["bias", "weight", "weight_scale"]
    assert tuple(layer("mxfp8", k=64).weight.shape) == (20, 64)
    assert "mul_scale" not in layer("mxfp4_dualscale", smooth=False).state_dict()


@method
def test_packed_weights_are_no_parameters(method):
    """Hosts read the dtype of a model's first parameter, and cast its parameters: both must see floats only."""
    assert [(name, p.dtype, p.requires_grad) for name, p in layer(method).named_parameters()] == [
        ("bias", torch.bfloat16, False)
    ]


@case
def test_copies_compute_alike(method, activation, scheme):
    m, x = layer(method, activation), torch.randn(4, 1056).bfloat16()
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert same_state(m, other) and other.scheme == scheme and torch.equal(other(x), m(x))


@pytest.mark.slow
@case
def test_compiled_whole(method, activation, scheme):
    torch.compiler.reset()
    m, x = layer(method, activation), torch.randn(4, 3, 1056).bfloat16()
    assert torch.equal(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))


@pytest.mark.slow
def test_compiled_by_inductor():
    torch.compiler.reset()
    model = nn.Sequential(layer("mxfp4", k=64, n=64), nn.GELU(), layer("mxfp4_dualscale", k=64)).eval()
    x = torch.randn(4, 64).bfloat16()
    first = torch.compile(model[0], fullgraph=True)(x)
    assert torch.equal(first, model[0](x))
    assert torch.compile(model, fullgraph=True)(x).shape == (4, 20)


@pytest.mark.parametrize(("method", "activation", "scheme"), [row for row in CASES if FORMATS[row[0]].smooths])
def test_mul_scale_is_stored_as_bf16_values_and_multiplies_activations(method, activation, scheme):
    weight, scale = torch.randn(6, 64).bfloat16(), torch.rand(64) + 0.5
    m = MXLinear.from_weight(weight, None, method=method, activation=activation, mul_scale=scale)
    assert m.mul_scale is not None and m.mul_scale.dtype is torch.float32
    assert torch.equal(m.mul_scale, scale.bfloat16().float())
    plain = MXLinear.from_weight(weight, None, method=method, activation=activation)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(m(x), plain(x * scale.bfloat16())) and not torch.equal(m(x), plain(x))


def test_repr_names_the_scheme():
    text = repr(nn.Sequential(layer("mxfp4_dualscale", "mxfp8")))
    for word in ("in_features=1056", "out_features=20", "bias=True", "method=mxfp4_dualscale", "scheme=w4a8", "smooth"):
        assert word in text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MXLinear(64, 8, method="int4"), ["unknown format", "'int4'", "mxfp4_dualscale"]),
        (lambda: MXLinear(63, 8, method="mxfp4"), ["in_features=63", "even"]),
        (lambda: MXLinear(64, 0, method="mxfp8"), ["out_features=0", "positive"]),
        (lambda: MXLinear(64, 8, method="mxfp4", rule="cublas"), ["'cublas'", "uos"]),
        (lambda: MXLinear(64, 8, method="mxfp8", smooth=True), ["mxfp8 takes no mul_scale", "four-bit"]),
        (lambda: MXLinear(64, 8, method="mxfp8", activation="mxfp4"), ["mxfp8 weights", "'mxfp4'"]),
        (lambda: MXLinear(64, 8, method="mxfp4", activation="int8"), ["'int8'", "mxfp4, mxfp8, bf16"]),
        (lambda: setattr(layer("mxfp8"), "activation", "mxfp4"), ["mxfp8 weights", "'mxfp4'", "mxfp8, bf16"]),
        (lambda: layer("mxfp4")(torch.randn(3, 64)), ["last axis", "K = 64"]),
        (lambda: MXLinear.from_weight(torch.randn(64), None, method="mxfp4"), ["two axes", "(64,)"]),
        (lambda: from_multipliers(torch.ones(32)), ["(32,)", "(64,)"]),
        (lambda: from_multipliers(torch.tensor([1.0] * 9 + [0.0] + [1.0] * 54)), ["0.0 at channel 9", "positive"]),
        (lambda: from_multipliers(torch.full((64,), 3.4e38)), ["channel 0", "bf16"]),
    ],
)
def test_errors_say_what_and_what_else(call, words):
    with pytest.raises(mxdit.FormatError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def from_multipliers(mul_scale: torch.Tensor) -> MXLinear:
    return MXLinear.from_weight(torch.randn(8, 64), None, method="mxfp4_dualscale", mul_scale=mul_scale)
