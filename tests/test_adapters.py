"""LoRAs beside quantized linears, by diffusers' own calls: methods x ways to be quantized x operations, to the bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import loras
import mxdit
import tiny
from adapted import Untouched, lora, smoothed
from mxdit.layers import MXLinear, linears_of
from mxdit.quantize.adapters import tuners

pytestmark = pytest.mark.slow

METHODS = ("mxfp4", "mxfp4_dualscale", "mxfp8")
WAYS = ("online", "packed", "memory", "smoothed")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("source") / "t2v")


@pytest.fixture(scope="module")
def load(source, tmp_path_factory):
    """A pipeline with both experts quantized in one of the ways."""
    dtypes = {"vae": torch.float32, "default": torch.bfloat16}

    def loaded(method: str, way: str = "memory") -> WanPipeline:
        if way in ("online", "packed"):
            config = mxdit.pipeline_config(method, num_bf16_fallback_layers=0)
            pipe = WanPipeline.from_pretrained(source, torch_dtype=dtypes, quantization_config=config)
            if way == "packed":
                directory = tmp_path_factory.mktemp("packed")
                pipe.save_pretrained(directory)
                pipe = WanPipeline.from_pretrained(directory, torch_dtype=dtypes)
        else:
            pipe = WanPipeline.from_pretrained(source, torch_dtype=dtypes)
            for model in (pipe.transformer, pipe.transformer_2):
                mxdit.quantize_(model, {"quant_method": method, "num_bf16_fallback_layers": 0})
                if way == "smoothed":
                    smoothed(model, method)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return loaded


# MXFP8 takes no multipliers.
@pytest.mark.parametrize(
    ("method", "way"), [(of, way) for of in METHODS for way in WAYS if (of, way) != ("mxfp8", "smoothed")]
)
def test_every_operation(load, method, way):
    pipe = load(method, way)
    model, other = pipe.transformer, pipe.transformer_2
    before, before_other = Untouched(model), Untouched(other)

    pipe.load_lora_weights(lora(model), adapter_name="a")
    with_a = tiny.forward(model)
    assert not torch.equal(with_a, before.output) and torch.equal(tiny.forward(other), before_other.output)
    pipe.load_lora_weights(lora(other, 8, seed=1), adapter_name="b", load_into_transformer_2=True)
    pipe.load_lora_weights(lora(model, 8, seed=2), adapter_name="b")
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"], "transformer_2": ["b"]}

    pipe.set_adapters("a")
    assert torch.equal(tiny.forward(model), with_a) and torch.equal(tiny.forward(other), before_other.output)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    with_both = tiny.forward(model)
    assert not torch.equal(with_both, with_a) and not torch.equal(tiny.forward(other), before_other.output)
    pipe.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(tiny.forward(model), before.output)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    assert torch.equal(tiny.forward(model), with_both)

    pipe.disable_lora()
    assert torch.equal(tiny.forward(model), before.output) and torch.equal(tiny.forward(other), before_other.output)
    pipe.enable_lora()
    assert torch.equal(tiny.forward(model), with_both)

    pipe.set_adapters("a")
    pipe.delete_adapters("b")
    assert torch.equal(tiny.forward(model), with_a)
    before_other.check(trained=False)
    pipe.delete_adapters("a")
    before.check(trained=False)

    pipe.load_lora_weights(lora(model), adapter_name="a")
    assert torch.equal(tiny.forward(model), with_a)
    pipe.unload_lora_weights()
    before.check(trained=False)


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_is_added_to_the_quantized_product_of_the_same_input(load, method):
    """In the activations' dtype, on the input before it is multiplied and quantized."""
    pipe = load(method, "memory" if method == "mxfp8" else "smoothed")
    model, state, seen = pipe.transformer, lora(pipe.transformer), {}
    pipe.load_lora_weights(state, adapter_name="a")
    pipe.set_adapters("a", 0.5)
    for path, layer in tuners(model):
        layer.register_forward_hook(
            lambda layer, inputs, output, path=path: seen.update({path: (layer, *inputs, output)})
        )
    tiny.forward(model)
    over_packed = 0
    for path, (layer, x, y) in seen.items():
        a, b = (state[f"transformer.{path}.lora_{part}.weight"].bfloat16() for part in "AB")
        with torch.no_grad():
            base, down = layer.base_layer(x), linear(x, a)
        if isinstance(layer.base_layer, MXLinear):  # one rounding of the sum
            delta = down.double() @ b.double().T * 0.5
            error = (y.double() - (base.double() + delta)).abs()
            assert (error <= 2**-8 * y.double().abs() + 2**-20 * (base.double().abs() + delta.abs())).all(), path
            over_packed += 1
        else:
            assert torch.equal(y, base + linear(down, b) * 0.5), path
    assert over_packed == 10 and len(seen) == 11


def test_whoever_looks_at_a_quantized_product_sees_it_without_the_adapter(load):
    pipe = load("mxfp4", "memory")
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    layer, seen = pipe.transformer.blocks[0].attn1.to_q, []
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        plain = layer(x)
        layer.base_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        assert torch.equal(layer(x), plain) and torch.equal(seen[0], layer.base_layer(x))
    assert not torch.equal(seen[0], plain)


def test_a_clip_changes_and_changes_back(load, tmp_path):
    pipe = load("mxfp4", "packed")
    plain = tiny.generate(pipe)
    experts = ("transformer", "transformer_2")
    files = {name: loras.save(tmp_path / name, lora(pipe.transformer, seed=seed)) for seed, name in enumerate(experts)}
    mxdit.load_lora_weights(pipe, files, "style")
    assert pipe.get_list_adapters() == {"transformer": ["style"], "transformer_2": ["style"]}
    assert (tiny.generate(pipe) != plain).any()
    pipe.unload_lora_weights()
    assert (tiny.generate(pipe) == plain).all()


def test_what_mxdit_says_of_a_model_is_the_same_with_adapters(load):
    pipe = load("mxfp4")
    model, plain = pipe.transformer, str(mxdit.report_of(pipe.transformer))
    pipe.load_lora_weights(lora(model), adapter_name="a")
    assert str(mxdit.report_of(model)) == plain
    assert mxdit.plan(model, "mxfp4").keys() == {path for path, _ in linears_of(model)}
    mxdit.set_activation(model, "mxfp8", ["blocks.0.attn1.to_*"])
    assert model.blocks[0].attn1.to_q.base_layer.scheme == "w4a8"


def test_copies_have_their_own_adapters(load):
    pipe = load("mxfp4")
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    adapted = tiny.forward(pipe.transformer)
    for other in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert type(other) is type(pipe.transformer) and torch.equal(tiny.forward(other), adapted)
        with pytest.raises(mxdit.ModelError, match="cannot be fused"):
            other.fuse_lora()
        other.unload_lora()
    assert torch.equal(tiny.forward(pipe.transformer), adapted)


def test_an_adapter_is_swapped_in_place(load):
    """diffusers' hotswap: the same tensors, which a compiled graph holds, get another adapter's numbers and rank."""
    pipe = load("mxfp4")
    model = pipe.transformer
    pipe.load_lora_weights(lora(model, 4, seed=5), adapter_name="other")
    other = tiny.forward(model)
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora(model, 8), adapter_name="a")
    held = model.blocks[0].attn1.to_q.lora_A["a"].weight
    pipe.load_lora_weights(lora(model, 4, seed=5), adapter_name="a", hotswap=True)
    assert model.blocks[0].attn1.to_q.lora_A["a"].weight is held and torch.equal(tiny.forward(model), other)
    before = Untouched(model)
    with pytest.raises(mxdit.CheckpointError, match="infs or NaNs"):
        pipe.load_lora_weights({k: t / 0 for k, t in lora(model).items()}, adapter_name="a", hotswap=True)
    before.check()


@pytest.mark.parametrize(
    "kind", ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1})
)
def test_groups_are_offloaded_with_their_adapters(load, kind):
    pipe = load("mxfp4")
    model = pipe.transformer
    plain = tiny.forward(model)
    pipe.load_lora_weights(lora(model), adapter_name="a")
    adapted = tiny.forward(model)
    pipe.unload_lora_weights()
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **kind)
    pipe.load_lora_weights(lora(model), adapter_name="a")
    assert torch.equal(tiny.forward(model), adapted)
    with pytest.raises(mxdit.CheckpointError, match="infs or NaNs"):
        pipe.load_lora_weights({k: t / 0 for k, t in lora(model).items()}, adapter_name="b")
    assert torch.equal(tiny.forward(model), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(tiny.forward(model), plain)


def test_layerwise_casting_leaves_quantized_linears_alone(load):
    """They are `nn.Linear`s to diffusers, which stores those in eight bits: there is nothing to be won, and a bias to be lost."""
    model = load("mxfp4").transformer
    before = {
        p: {n: t.clone() for n, t in m.state_dict().items()} for p, m in linears_of(model) if isinstance(m, MXLinear)
    }
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.isfinite(tiny.forward(model)).all() and len(before) == 20
    for path, tensors in before.items():
        for name, tensor in model.get_submodule(path).state_dict().items():
            assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_layer_compiles_whole_and_moves(load, method):
    pipe = load(method)
    pipe.load_lora_weights(lora(pipe.transformer), adapter_name="a")
    layer, x = pipe.transformer.blocks[0].attn1.to_q, torch.randn(4, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        away = copy.deepcopy(layer).to("meta")
        assert {t.device.type for t in (*away.parameters(), *away.buffers())} == {"meta"}
        assert away(x.to("meta")).shape == (4, 64)


def test_layers_that_only_some_adapters_have(load):
    """As in a cascade's own files: an adapter of attention beside one of the FFN."""
    pipe = load("mxfp4")
    model = pipe.transformer
    pipe.load_lora_weights(lora(model, linears=("attn1.to_q",)), adapter_name="attention")
    alone = tiny.forward(model)
    pipe.load_lora_weights(lora(model, linears=("ffn.net.2",), seed=1), adapter_name="ffn")
    pipe.set_adapters(["attention", "ffn"])
    assert not torch.equal(tiny.forward(model), alone)
    pipe.delete_adapters("ffn")
    assert torch.equal(tiny.forward(model), alone)


def test_a_load_copies_no_adapter_that_is_there(load):
    """Or each file that a server switches to would take the memory of all the others again."""

    class Copies(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and made.device.type == "cpu":
                self.nbytes += made.nbytes
            return made

    pipe = load("mxfp4")
    with Copies() as first:
        pipe.load_lora_weights(lora(pipe.transformer, 16), adapter_name="a")
    with Copies() as second:
        pipe.load_lora_weights(lora(pipe.transformer, 16, seed=1), adapter_name="b")
    assert 0 < second.nbytes <= first.nbytes
