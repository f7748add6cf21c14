"""plan, quantize_, set_activation: what each linear becomes, why the others stay, and what is refused."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import mxdit
import tiny
from mxdit.config import MXConfig
from mxdit.errors import ConfigError, ModelError
from mxdit.models import SPECS, spec_of
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.plan import fallback_blocks

QKV = [f"blocks.0.attn1.to_{name}" for name in "qkv"]


def meta(**overrides):
    with torch.device("meta"):
        return tiny.transformer(**overrides)


def schemes(model, config):
    return {path: str(decision) for path, decision in mxdit.plan(model, config).items()}


def test_plan_quantizes_every_block_linear_and_no_other():
    decided = schemes(meta(), "mxfp4")
    assert list(decided) == [path for path, module in meta().named_modules() if isinstance(module, nn.Linear)]
    inside = {path for path in decided if path.startswith("blocks.")}
    assert len(inside) == tiny.BLOCKS * tiny.LINEARS
    assert {decided[path] for path in inside} == {"w4a4"}
    assert {reason for path, reason in decided.items() if path not in inside} == {"outside the blocks"}
    assert {"proj_out", "condition_embedder.time_proj"} <= set(decided) - inside


def test_plan_of_the_image_branch_of_wan21():
    decided = schemes(meta(added_kv_proj_dim=64, image_dim=32), "mxfp4")
    assert decided["blocks.1.attn2.add_k_proj"] == decided["blocks.1.attn2.add_v_proj"] == "w4a4"
    assert decided["condition_embedder.image_embedder.ff.net.0.proj"] == "outside the blocks"
    half = {"quant_method": "mxfp4", "ignored_layers": ["blocks.1.attn2.add_k_proj"]}
    with pytest.raises(ConfigError, match=r"share their input.*add_k_proj kept, blocks.1.attn2.add_v_proj w4a4"):
        schemes(meta(added_kv_proj_dim=64, image_dim=32), half)


def test_reasons_name_the_pattern():
    names = ("blocks.0.*", "*.ffn.net.2", "blocks.1.attn2.to_q", "proj_out")
    config = MXConfig("mxfp4", ignored_layers=names, num_bf16_fallback_layers=1)
    decided = schemes(meta(num_layers=3), config)
    assert decided["blocks.0.attn1.to_q"] == "ignored_layers: blocks.0.*"
    assert decided["blocks.2.ffn.net.2"] == "ignored_layers: *.ffn.net.2"
    assert decided["blocks.1.attn2.to_q"] == "ignored_layers"
    assert decided["proj_out"] == "outside the blocks"
    assert decided["blocks.1.ffn.net.0.proj"] == "w4a4"
    assert (
        schemes(meta(num_layers=3), {"quant_method": "mxfp4", "num_bf16_fallback_layers": 2})["blocks.1.attn1.to_q"]
        == "num_bf16_fallback_layers: 2"
    )


def test_scheme_per_activation_and_layer():
    model = meta()
    assert set(schemes(model, MXConfig("mxfp4", activation="bf16")).values()) == {"w4a16", "outside the blocks"}
    assert set(schemes(model, "mxfp8").values()) == {"w8a8", "outside the blocks"}
    mixed = schemes(model, MXConfig("mxfp4_dualscale", w4a8_fallback_layers=("*.ffn.*",)))
    assert mixed["blocks.0.ffn.net.2"] == "w4a8" and mixed["blocks.0.attn1.to_q"] == "w4a4"


@pytest.mark.parametrize(
    ("method", "blocks", "first"),
    [
        ("mxfp4_dualscale", 40, 5),  # Wan2.2 A14B, as vLLM-Omni
        ("mxfp4_dualscale", 30, 5),  # Wan2.2 TI2V-5B, as vLLM-Omni
        ("mxfp4_dualscale", 12, 2),
        ("mxfp4_dualscale", 4, 0),
        ("mxfp4", 40, 0),
        ("mxfp8", 40, 0),
    ],
)
def test_default_fallback_blocks(method, blocks, first):
    assert fallback_blocks(MXConfig(method), blocks) == first
    assert fallback_blocks(MXConfig(method, num_bf16_fallback_layers=3), blocks) == 3
    assert fallback_blocks(MXConfig(method, is_checkpoint_serialized=True), blocks) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ignored_layers": ["blocks.0.attn1.to_w"]},
            "'blocks.0.attn1.to_w': the pattern matches nothing.* Did you mean ",
        ),
        ({"ignored_layers": ["transformer.*"]}, "'transformer.*': the pattern matches nothing.*Paths look like"),
        (
            {"ignored_layers": ["blocks.0"]},
            "got 'blocks.0', a WanTransformerBlock.* the 10 inside it, write 'blocks.0.*'",
        ),
        (
            {"ignored_layers": ["blocks.0.norm2"]},
            "got 'blocks.0.norm2', a FP32LayerNorm.*expected a linear layer. Leave it out",
        ),
        ({"ignored_layers": ["patch_embedding"]}, "got 'patch_embedding', a Conv3d"),
        ({"w4a8_fallback_layers": ["blocks.9.*"]}, "w4a8_fallback_layers 'blocks.9.*': the pattern matches nothing"),
        (
            {"ignored_layers": QKV[:1]},
            "blocks.0: layers that share.*to_q kept, blocks.0.attn1.to_k w4a4.*Name all of them",
        ),
        ({"ignored_layers": ["blocks.1.attn2.to_k"]}, "blocks.1: layers.*to_k kept, blocks.1.attn2.to_v w4a4"),
        ({"w4a8_fallback_layers": ["*.to_v"]}, "to_q w4a4, blocks.0.attn1.to_k w4a4, blocks.0.attn1.to_v w4a8"),
        (
            {"ignored_layers": ["blocks.*"]},
            "leaves nothing quantized; got 26 linears, of which ignored_layers keeps 20, and 0",
        ),
        ({"num_bf16_fallback_layers": 2}, "leaves nothing quantized.* and 2 fallback blocks; expected.* 2 blocks"),
    ],
)
def test_plan_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        mxdit.plan(meta(), {"quant_method": "mxfp4", **values})


def test_a_whole_group_may_stay():
    decided = schemes(meta(), {"quant_method": "mxfp4", "ignored_layers": [*QKV, "*.attn2.to_[kv]"]})
    assert decided[QKV[0]].startswith("ignored") and decided["blocks.1.attn1.to_q"] == "w4a4"
    assert decided["blocks.0.attn2.to_q"] == "w4a4"  # its input is another


def test_a_model_without_a_spec_is_refused():
    with pytest.raises(ModelError, match=r"got Sequential\. .*supported-models.*adapting-a-model"):
        mxdit.plan(nn.Sequential(nn.Linear(64, 64)), "mxfp4")


def test_a_subclass_has_its_parents_spec():
    class Finetuned(type(meta())):
        pass

    assert spec_of(Finetuned.__new__(Finetuned)) is SPECS["WanTransformer3DModel"]


@pytest.mark.parametrize("method", FORMATS)
def test_quantize_in_place(method):
    model, floats = tiny.transformer().bfloat16(), tiny.transformer().bfloat16()
    report = mxdit.quantize_(model, method)
    assert len(report.quantized) == 20 and len(report.kept) == 6
    assert not any(module.training for module in model.modules())
    for layer in report.layers:
        module = model.get_submodule(layer.path)
        assert layer.shape == (module.out_features, module.in_features)
        assert layer.bytes_after == sum(t.nbytes for t in module.state_dict().values())
        original = floats.get_submodule(layer.path)
        assert layer.bytes_before == sum(t.nbytes for t in original.state_dict().values())
        assert torch.equal(module.bias, original.bias)
        if layer.scheme:
            packed = mxdit.encode(original.weight, method)
            assert torch.equal(module.weight, packed.codes) and torch.equal(module.weight_scale, packed.scale)
            assert layer.method == module.method == method and not layer.reason
        else:
            assert type(module) is nn.Linear and layer.reason == "outside the blocks"
    rate = {"mxfp4": 4.25, "mxfp4_dualscale": 4.25, "mxfp8": 8.25}[method] / 16
    weights = [layer for layer in report.quantized if layer.shape == (64, 576)]
    assert sum(x.bytes_after for x in weights) / sum(x.bytes_before for x in weights) == pytest.approx(rate, rel=0.1)
    error = (tiny.forward(model) - tiny.forward(floats)).float().norm() / tiny.forward(floats).float().norm()
    assert 0 < error < 0.3


def test_scale_rule_reaches_weights_and_activations():
    codes = {}
    for alg, rule in ((0, "ocp"), (2, "uos")):
        model = tiny.transformer().bfloat16()
        layer = model.blocks[0].ffn.net[2]
        layer.weight.data *= 1.45  # uniform weights: now the block maxima are above 7.25 times a power of two
        expected = mxdit.encode(layer.weight, "mxfp4", rule=rule)
        mxdit.quantize_(model, MXConfig("mxfp4", mxfp4_scale_alg=alg))
        assert model.blocks[0].ffn.net[2].rule == rule
        codes[rule] = model.blocks[0].ffn.net[2].weight
        assert torch.equal(codes[rule], expected.codes)
    assert not torch.equal(codes["ocp"], codes["uos"])


def test_every_float_weight_is_freed_before_the_next_is_read():
    model = tiny.transformer().bfloat16()
    paths = [path for path, decision in mxdit.plan(model, "mxfp4").items() if decision.scheme]
    weights = [weakref.ref(model.get_submodule(path).weight) for path in paths]
    alive = []

    class Watched(nn.Linear):
        """A linear that counts the float weights that live whenever its own is read."""

        def __getattr__(self, name):
            if name == "weight":
                alive.append(sum(weight() is not None for weight in weights))
            return super().__getattr__(name)

    for path in paths:
        model.get_submodule(path).__class__ = Watched
    gc.disable()
    try:
        mxdit.quantize_(model, "mxfp4")
    finally:
        gc.enable()
    n = len(paths)
    assert alive == [n] * n + list(range(n, 0, -1))  # a look at each beforehand, then one after the other
    assert not any(weight() for weight in weights)


def test_report_is_readable_and_serializable():
    model = tiny.transformer(num_layers=4).bfloat16()
    report = mxdit.quantize_(model, {"quant_method": "mxfp4", "ignored_layers": ["blocks.1.*"]})
    assert [x.path for x in mxdit.report_of(model).quantized] == [x.path for x in report.quantized]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "count", "shape", "MiB", "before", "MiB", "after", "runs", "as"]
    row = next(line for line in lines if line.startswith("blocks.0,2-3.ffn.net.2 "))
    assert row.split()[1:5] == ["3", "64", "x", "576"] and row.endswith("mxfp4 w4a4")
    assert any("kept (ignored_layers: blocks.1.*)" in line for line in lines)
    assert lines[-1].endswith("30 quantized, 16 kept")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["bytes_before"] == sum(layer["bytes_before"] for layer in values["layers"])
    assert values["bytes_after"] == report.bytes_after < 0.75 * report.bytes_before


def test_quantize_refuses_what_is_quantized_or_not_loaded():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    with pytest.raises(ModelError, match=r"blocks.0.attn1.to_q: the model is quantized already; got mxfp4"):
        mxdit.quantize_(model, "mxfp8")
    with pytest.raises(ModelError, match=r"weight is not loaded; got a tensor on the meta device"):
        mxdit.quantize_(meta(), "mxfp4")
    with pytest.raises(ConfigError, match=r"one of a serialized checkpoint"):
        mxdit.quantize_(tiny.transformer(), MXConfig("mxfp4", is_checkpoint_serialized=True))


def test_a_refused_config_changes_nothing():
    model = tiny.transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError):
        mxdit.quantize_(model, MXConfig("mxfp4", ignored_layers=("nothing",)))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in model.config


def test_a_pipeline_is_not_a_model():
    pipe = tiny.pipeline()
    for call in (lambda: mxdit.quantize_(pipe, "mxfp4"), lambda: mxdit.set_activation(pipe, "mxfp8")):
        with pytest.raises(ModelError, match=r"got WanPipeline.* Pass the transformer itself rather than a pipeline"):
            call()


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_weight_that_no_format_can_hold_is_named(method, bad):
    model = tiny.transformer().bfloat16()
    with torch.no_grad():
        model.blocks[1].ffn.net[2].weight[3, 40] = bad
    with pytest.raises(
        ModelError, match=r"blocks.1.ffn.net.2.weight: the weight holds what .* cannot; got 1 infs or NaNs"
    ):
        mxdit.quantize_(model, method)


def test_an_odd_number_of_input_features_stays():
    model = tiny.transformer(ffn_dim=575).bfloat16()
    decided = schemes(model, "mxfp4")
    assert decided["blocks.0.ffn.net.2"] == "odd number of input features"
    assert schemes(model, "mxfp8")["blocks.0.ffn.net.2"] == "w8a8"
    assert len(mxdit.quantize_(model, "mxfp4").quantized) == tiny.BLOCKS * (tiny.LINEARS - 1)


def test_an_mxfp8_activation_of_a_layer_that_stays_is_refused():
    config = {"quant_method": "mxfp4", "w4a8_fallback_layers": ["proj_out"]}
    with pytest.raises(ConfigError, match="'proj_out', which stays: outside the blocks"):
        schemes(meta(), config)


def test_set_activation_keeps_groups_together():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    with pytest.raises(ConfigError, match="layers that share their input"):
        mxdit.set_activation(model, "mxfp8", layers=["*.attn1.to_q"])
    assert {layer.scheme for layer in mxdit.report_of(model).quantized} == {"w4a4"}  # nothing was set


def test_every_mixture_that_a_config_states_is_recorded():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    mxdit.set_activation(model, "mxfp8")
    mxdit.set_activation(model, "bf16", layers=["blocks.1.*"])
    recorded = model.config.quantization_config
    assert recorded.activation == "bf16" and len(recorded.w4a8_fallback_layers) == tiny.LINEARS
    ran = [(layer.path, layer.scheme) for layer in mxdit.report_of(model).quantized]
    assert ran == [(path, str(d)) for path, d in mxdit.plan(model, recorded).items() if d.scheme]


def test_set_activation_on_some_layers():
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    mxdit.set_activation(model, "mxfp8", layers=["blocks.0.*", "blocks.1.ffn.net.2"])
    runs = {path: m.scheme for path, m in model.named_modules() if isinstance(m, mxdit.MXLinear)}
    assert {path for path, scheme in runs.items() if scheme == "w4a8"} == {
        *(path for path in runs if path.startswith("blocks.0.")),
        "blocks.1.ffn.net.2",
    }
    recorded = model.config.quantization_config
    assert recorded.activation == "mxfp4" and len(recorded.w4a8_fallback_layers) == 11
    mxdit.set_activation(model, "mxfp8")
    assert model.config.quantization_config.activation == "mxfp8"
    assert model.config.quantization_config.w4a8_fallback_layers == ()


def test_a_mixture_that_no_config_states_is_said_to_be_for_this_run(caplog):
    model = tiny.transformer().bfloat16()
    mxdit.quantize_(model, "mxfp4")
    mxdit.set_activation(model, "bf16", layers=["blocks.0.*"])
    assert "for this run only" in caplog.text
    assert model.config.quantization_config.activation == "mxfp4"


@pytest.mark.parametrize(
    ("method", "activation", "layers", "error", "message"),
    [
        ("mxfp4", "mxfp6", None, ConfigError, "unknown activation; got 'mxfp6'"),
        ("mxfp8", "mxfp4", None, ConfigError, "blocks.0.attn1.to_q: activations in 'mxfp4' do not go with .*'mxfp8'"),
        ("mxfp4", "mxfp8", ["blocks.7.*"], ConfigError, "layers 'blocks.7.*': the pattern matches nothing"),
        ("mxfp4", "mxfp8", ["proj_out"], ConfigError, "got 'proj_out', a Linear; expected a quantized linear"),
        ("mxfp4", "mxfp8", "blocks.0.*", ConfigError, "layers is one string"),
        (None, "mxfp8", None, ModelError, "no quantized linear"),
    ],
)
def test_set_activation_refuses(method, activation, layers, error, message):
    model = tiny.transformer().bfloat16()
    if method:
        mxdit.quantize_(model, method)
    with pytest.raises(error, match=message):
        mxdit.set_activation(model, activation, layers)
