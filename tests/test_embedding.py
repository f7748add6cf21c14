"""MXEmbedding: packed rows, looked up and decoded."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, UMT5Config, UMT5EncoderModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

import mxdit
from mxdit.embedding import MXEmbedding
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.preconditions import check_state

method = pytest.mark.parametrize("method", FORMATS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def table(method: str, v: int = 50, k: int = 544, dtype: torch.dtype = torch.bfloat16) -> MXEmbedding:
    weight = torch.randn(v, k).to(dtype)
    weight[0] = 0
    return MXEmbedding.from_weight(weight, method=method, padding_idx=0)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(
        left[name].dtype is right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


@pytest.mark.usefixtures("path")
@method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lookup_has_the_bits_of_the_decoded_table(method, dtype):
    """A row for each scale byte, with every code in it; of dual scales with outer scales of any size as well."""
    k = 256 if method == "mxfp8" else 512
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    byte = torch.arange(256, dtype=torch.uint8)
    parts = {"weight": codes.contiguous(), "weight_scale": byte[:, None].repeat(1, k // 32)}
    if FORMATS[method].outer:
        parts["weight_dual_scale"] = torch.exp2(torch.linspace(-120, 120, 256).round()).view(256, 1, 1)
    layer = MXEmbedding(256, k, method=method, device="meta", dtype=dtype)
    layer.load(parts)
    held = layer.packed()
    whole = torch.ops.mxdit.dequantize(held.codes, held.scale, held.outer, held.fmt, dtype)
    torch.testing.assert_close(whole, mxdit.decode(held, dtype), rtol=0, atol=0, equal_nan=True)
    several = torch.randint(0, 256, (2, 3, 5))
    for ids in (torch.arange(256), several, several.int(), torch.tensor(255)):
        got = layer(ids)
        assert got.shape == (*ids.shape, k) and got.dtype is dtype
        assert torch.equal(bits(got), bits(whole[ids.long()]))
    assert layer(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, k)


@method
def test_from_weight_is_the_codec_and_the_padding_row_is_zero(method):
    weight = torch.randn(20, 64).bfloat16()
    weight[3] = 0
    layer = MXEmbedding.from_weight(weight, method=method, padding_idx=-17)
    packed = mxdit.encode(weight, method)
    assert layer.padding_idx == 3 and torch.equal(layer.weight, packed.codes)
    assert torch.equal(layer(torch.arange(20)), mxdit.decode(packed, torch.bfloat16))
    assert not layer(torch.tensor([3])).any()
    assert not layer(torch.tensor([3])).requires_grad and not list(layer.parameters())


def test_rows_of_an_odd_length():
    layer = table("mxfp8", k=33)
    assert torch.equal(layer(torch.tensor([4])), mxdit.decode(layer.packed(), torch.bfloat16)[[4]])


@method
@pytest.mark.parametrize("ids", [torch.tensor([50]), torch.tensor([-1]), torch.tensor([0.5])])
def test_ids_outside_the_table_are_torchs_own_error(method, ids):
    with pytest.raises((IndexError, RuntimeError)) as ours:
        table(method)(ids)
    with pytest.raises((IndexError, RuntimeError)) as torchs:
        nn.Embedding(50, 4)(ids)
    assert ours.type is torchs.type and str(ours.value) == str(torchs.value)


@method
def test_casts_change_what_a_lookup_returns_and_no_scale(method):
    layer, ids = table(method), torch.arange(50)
    before = copy.deepcopy(layer)
    for dtype in DTYPES:
        nn.Sequential(layer).to(dtype)
        assert same_state(layer, before)
        assert torch.equal(layer(ids), mxdit.decode(before.packed(), dtype))
    moved = copy.deepcopy(layer).to("meta", torch.float16)
    assert {t.device.type for t in moved.buffers()} == {"meta"} and moved.dtype is torch.float16
    assert moved(ids.to("meta")).shape == (50, 544) and moved(ids.to("meta")).dtype is torch.float16
    back = moved.to_empty(device="cpu")
    assert back.weight_dual_scale is None or back.weight_dual_scale.dtype is torch.float32


@method
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_and_copies(method, assign):
    layer, ids = table(method), torch.tensor([[4, 0], [49, 4]])
    fresh = MXEmbedding(50, 544, method=method, padding_idx=0, dtype=torch.bfloat16)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    assert not any(fresh.load_state_dict(torch.load(stream, weights_only=True), assign=assign))
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_state(layer, other) and torch.equal(other(ids), layer(ids)) and repr(other) == repr(layer)


@pytest.mark.slow
@method
def test_compiled_whole(method):
    torch.compiler.reset()
    layer, ids = table(method), torch.tensor([[4, 0], [49, 4]])
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids), layer(ids))


def umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=60, d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).to(torch.bfloat16).eval()


@method
def test_tied_embeddings_of_an_encoder_are_one_module(method):
    model, ids = umt5(), torch.tensor([[5, 59, 1, 0]])
    shared = MXEmbedding.like(model.shared, method=method)
    shared.load(mxdit.quantize_weight(model.shared.weight, method))
    with torch.no_grad():  # what it ought to compute, by the float model
        model.shared.weight.copy_(mxdit.decode(shared.packed(), torch.bfloat16))
    expected = model(ids).last_hidden_state
    model.set_input_embeddings(shared)
    assert model.get_submodule("shared") is model.get_submodule("encoder.embed_tokens")
    assert torch.equal(model(ids).last_hidden_state, expected)

    state = model.state_dict()
    names = [name for name in ("weight", "weight_scale", "weight_dual_scale") if getattr(shared, name) is not None]
    for name in names:
        assert state[f"shared.{name}"].data_ptr() == state[f"encoder.embed_tokens.{name}"].data_ptr()
    assert model.to(torch.float32)(ids).last_hidden_state.dtype is torch.float32
    assert shared(ids).dtype is torch.float32
    model.to(torch.bfloat16)

    other = umt5()
    other.set_input_embeddings(MXEmbedding.like(other.shared, method=method))
    assert not any(other.load_state_dict(state))
    assert torch.equal(other(ids).last_hidden_state, expected)
    one = {name: part for name, part in state.items() if "embed_tokens" not in name}  # as a file has it
    assert not other.load_state_dict(one, strict=False).unexpected_keys
    with pytest.raises(mxdit.FormatError, match=r"encoder.embed_tokens.weight: not a tensor of this .* layer"):
        check_state(other, umt5().state_dict() | {f"shared.{name}": state[f"shared.{name}"] for name in names}, "")


def scaled() -> nn.Embedding:
    keys = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3TextModel(Gemma3TextConfig(vocab_size=30, num_key_value_heads=1, head_dim=32, **keys)).embed_tokens


def take(embedding: nn.Embedding) -> MXEmbedding:
    return MXEmbedding.like(embedding, method="mxfp8", where="model.embed_tokens")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MXEmbedding(5, 64, method="int4"), ["unknown format", "'int4'"]),
        (lambda: MXEmbedding(5, 63, method="mxfp4"), ["in_features=63", "even"]),
        (lambda: MXEmbedding(5, 64, method="mxfp8", rule="uos"), ["scale rule", "'uos'", "ocp or cublas"]),
        (lambda: MXEmbedding(5, 64, method="mxfp8", dtype=torch.float64), ["torch.float64", "torch.bfloat16"]),
        (lambda: MXEmbedding(5, 64, method="mxfp8", padding_idx=5), ["padding_idx=5", "5 rows"]),
        (
            lambda: table("mxfp8").load({"weight": torch.zeros(50, 544)}),
            ["float32; expected (50, 544) uint8", "does not quantize"],
        ),
        (lambda: table("mxfp8").load({"mul_scale": torch.ones(544)}), ["mul_scale", "weight, weight_scale"]),
        (lambda: table("mxfp4").load_state_dict({"weight": torch.zeros(50, 544)}), ["(50, 544)", "(50, 272)"]),
        (lambda: take(nn.Embedding(5, 64, max_norm=1.0)), ["model.embed_tokens", "max_norm=1.0", "float dtype"]),
        (lambda: take(nn.Embedding(5, 64, sparse=True)), ["sparse=True"]),
        (lambda: take(nn.Embedding(5, 64, scale_grad_by_freq=True)), ["scale_grad_by_freq=True"]),
        (lambda: take(scaled()), ["Gemma3TextScaledWordEmbedding", "torch.nn.Embedding itself"]),
        (lambda: MXEmbedding.from_weight(torch.full((2, 64), torch.inf), method="mxfp8"), ["128 infs"]),
    ],
)
def test_errors_say_what_and_what_else(call, words):
    with pytest.raises(mxdit.FormatError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_it_takes_what_an_embedding_has():
    embedding = nn.Embedding(30, 64, padding_idx=2, dtype=torch.float16)
    layer = MXEmbedding.like(embedding, method="mxfp4", rule="ocp", device="meta")
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (30, 64, 2)
    assert layer.dtype is torch.float16 and layer.weight.is_meta and layer.rule == "ocp"
    assert repr(layer) == "MXEmbedding(30, 64, padding_idx=2, method=mxfp4, rule=ocp, dtype=torch.float16)"
