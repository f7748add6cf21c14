"""Text encoders: real models of transformers at tiny size, quantized while they load, saved, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import UMT5EncoderModel

import mxdit
from mxdit.config.encoders import encoder_config, read_stated, stated
from mxdit.errors import CheckpointError, ConfigError, ModelError
from mxdit.generation.directory import bundled
from mxdit.integrations.transformers import EncoderConfig
from mxdit.layers import HostedLinear

TINY_T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 14,
}  # fmt: skip
DECODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 99, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLIP = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "projection_dim": 32, "eos_token_id": 98, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GEMMA3 = {**DECODER, "query_pre_attn_scalar": 16}
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"mrope_section": [2, 3, 3], "type": "default", "rope_type": "default"}
# Class, its config's class, the config, and how many linears of its blocks there are.
FAMILIES = {
    "umt5": ("UMT5EncoderModel", "UMT5Config", TINY_T5, 14),
    "t5": ("T5EncoderModel", "T5Config", TINY_T5, 14),
    "t5-v1.0": ("T5EncoderModel", "T5Config", {**TINY_T5, "feed_forward_proj": "relu"}, 12),
    "clip": ("CLIPTextModel", "CLIPTextConfig", CLIP, 12),
    "clip-projection": ("CLIPTextModelWithProjection", "CLIPTextConfig", CLIP, 12),
    "llama": ("LlamaModel", "LlamaConfig", DECODER, 14),
    "llama-causal": ("LlamaForCausalLM", "LlamaConfig", DECODER, 14),
    "gemma2": ("Gemma2Model", "Gemma2Config", {**DECODER, "query_pre_attn_scalar": 16}, 14),
    "gemma2-causal": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "query_pre_attn_scalar": 16}, 14),
    "gemma3-text": ("Gemma3TextModel", "Gemma3TextConfig", GEMMA3, 14),
    "gemma3-causal": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3, 14),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": GEMMA3, "vision_config": SIGLIP, "mm_tokens_per_image": 4},
        14,
    ),
    "qwen2": ("Qwen2Model", "Qwen2Config", DECODER, 14),
    "qwen2-causal": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, 14),
    "qwen2.5-vl-text": ("Qwen2_5_VLTextModel", "Qwen2_5_VLTextConfig", {**DECODER, "rope_scaling": ROPE}, 14),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": {**DECODER, "rope_scaling": ROPE}, "vision_config": VISION},
        14,
    ),
}
IDS = torch.tensor([[5, 17, 42, 3, 88, 98], [9, 2, 61, 30, 1, 98]])


def made(family: str, folder: Path) -> nn.Module:
    """A model of this family with random weights, saved in BF16."""
    name, config, values, _ = FAMILIES[family]
    torch.manual_seed(3)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def loaded(model: nn.Module, folder: Path, **options):
    return type(model).from_pretrained(folder, dtype=options.pop("dtype", torch.bfloat16), **options)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_quantized_while_it_loads_saved_and_loaded_again_bit_for_bit(family, method, tmp_path):
    model = made(family, tmp_path / "float")
    online = loaded(model, tmp_path / "float", quantization_config=EncoderConfig(method))
    layers = {path: m for path, m in online.named_modules() if isinstance(m, HostedLinear)}
    assert len(layers) == FAMILIES[family][3]
    assert {layer.scheme for layer in layers.values()} == {"w8a16" if method == "mxfp8" else "w4a16"}

    # Against the same model whose weights are rounded and multiplied by torch: the layer adds no error of its own but the
    # order of the sums.
    for path, layer in layers.items():
        weight = model.get_submodule(path).weight
        packed = mxdit.encode(weight.data, method)
        assert torch.equal(layer.packed().codes, packed.codes) and torch.equal(layer.packed().scale, packed.scale)
        weight.data = mxdit.decode(packed).to(torch.bfloat16)
    want, got = output(model).float(), output(online).float()
    assert (got - want).norm() <= 0.02 * want.norm()

    online.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == f"mxdit_{method}" and stored["activation"] == "bf16"
    again = loaded(model, tmp_path / "packed")
    assert same(online, again) and torch.equal(output(again), output(online))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "packed" / "model.safetensors"
    ).read_bytes()
    assert mxdit.report_of(again).to_dict() == mxdit.report_of(online).to_dict()


def test_a_model_in_memory_is_quantized_saved_and_loaded_again(tmp_path):
    model = made("umt5", tmp_path / "float")
    online = loaded(model, tmp_path / "float", quantization_config=EncoderConfig("mxfp8"))
    report = mxdit.quantize_(model, {"quant_method": "mxfp8", "activation": "bf16"})
    assert len(report.quantized) == 14 and same(model, online)
    mxdit.set_activation(model, "mxfp8", ["*.wo"])
    model.save_pretrained(tmp_path / "packed")
    again = loaded(model, tmp_path / "packed")
    schemes = {path.rpartition(".")[2]: m.scheme for path, m in again.named_modules() if isinstance(m, HostedLinear)}
    assert schemes["wo"] == "w8a8" and schemes["wi_0"] == schemes["q"] == "w8a16"


@pytest.mark.parametrize("family", ["umt5", "t5", "t5-v1.0"])
def test_the_feed_forward_does_not_cast_what_it_gives_to_wo(family, tmp_path):
    """It casts to the dtype of the weight unless that is int8: bytes of activations would be nothing but noise."""
    model = made(family, tmp_path)
    quantized = loaded(model, tmp_path, quantization_config=EncoderConfig("mxfp8"))
    seen = []
    wo = quantized.encoder.block[0].layer[1].DenseReluDense.wo
    wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    output(quantized)
    assert seen == [torch.bfloat16]
    assert wo.weight.dtype == torch.int8 and wo.state_dict()["weight"].dtype == torch.uint8


def test_in_fp16_what_transformers_keeps_in_fp32_is_kept(tmp_path):
    model = made("umt5", tmp_path / "float")
    half = loaded(model, tmp_path / "float", dtype=torch.float16, quantization_config=EncoderConfig("mxfp8"))
    wo = half.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, nn.Linear) and wo.weight.dtype == torch.float32
    assert isinstance(half.encoder.block[0].layer[1].DenseReluDense.wi_0, HostedLinear)
    assert output(half).isfinite().all()
    half.save_pretrained(tmp_path / "packed")
    assert same(half, loaded(model, tmp_path / "packed", dtype=torch.float16))
    loaded(model, tmp_path / "float", quantization_config=EncoderConfig("mxfp8")).save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="which transformers keeps in FP32"):
        loaded(model, tmp_path / "whole", dtype=torch.float16)


@pytest.mark.slow
def test_a_pipeline_quantizes_its_text_encoder_too_and_loads_again_without_an_argument(tmp_path):
    from diffusers import WanPipeline

    source, prompt = bundled("t2v"), "a red seven moving left on a blue background"
    config = mxdit.pipeline_config("mxfp4", ignored_layers=["blocks.0.*"], text_encoder={"quant_method": "mxfp8"})
    pipe = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16, quantization_config=config)
    assert len(mxdit.report_of(pipe.text_encoder).quantized) == 14
    assert {layer.scheme for layer in mxdit.report_of(pipe.transformer).quantized} == {"w4a4"}
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert same(pipe.text_encoder, again.text_encoder) and same(pipe.transformer_2, again.transformer_2)
    one, other = (p.encode_prompt(prompt, device="cpu")[0] for p in (pipe, again))
    assert torch.equal(one, other) and one.isfinite().all()


def test_a_text_encoder_alone_may_be_quantized():
    config = mxdit.pipeline_config("mxfp4", transformer=None, transformer_2=None, text_encoder_2="mxfp8")
    assert list(config.quant_mapping) == ["text_encoder_2"]
    given = config.quant_mapping["text_encoder_2"]
    assert given.quant_method == "mxdit_mxfp8" and given.config == mxdit.MXConfig("mxfp8", activation="bf16")


def test_the_config_is_read_as_it_is_stated():
    config = encoder_config(
        {"quant_method": "mxfp4", "ignored_layers": ["*.wo"], "activation": "mxfp8"}, "text_encoder"
    )
    assert config.activation == "mxfp8" and read_stated(stated(config)) == config
    with pytest.raises(ConfigError, match="no quantization config of mxdit"):
        read_stated({"quant_method": "mxfp8"})  # transformers' own method of that name


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"activation": "bf16"}, "no config for a text encoder"),
        (3, "no config for a text encoder"),
        ({"quant_method": "mxfp5"}, "unknown quant_method"),
        ({"quant_method": "mxfp8", "activation": "mxfp4"}, "do not go with weights"),
        ({"quant_method": "mxfp8", "activation_steps": {"mxfp8": [0]}}, "before the first denoising step"),
    ],
)
def test_what_means_nothing_for_a_text_encoder_is_refused(own, said):
    with pytest.raises(ConfigError, match=said):
        mxdit.pipeline_config("mxfp4", text_encoder=own)


def test_the_names_of_transformers_own_methods_stay_its_own():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    for name, quantizer in AUTO_QUANTIZER_MAPPING.items():
        assert name.startswith("mxdit_") == quantizer.__module__.startswith("mxdit.")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = made("umt5", folder / "float")
    loaded(model, folder / "float", quantization_config=EncoderConfig("mxfp8")).save_pretrained(folder / "mxfp8")
    return folder


Q = "encoder.block.1.layer.0.SelfAttention.q"


def _changed(packed: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(packed / "mxfp8" / "model.safetensors")
    config = json.loads((packed / "mxfp8" / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda t, c: t.pop(f"{Q}.weight"),
        lambda t, c: t.pop(f"{Q}.weight_scale"),
        lambda t, c: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}),  # transformers would cast it to bytes
        lambda t, c: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].float()}),
        lambda t, c: t.update({f"{Q}r.weight": t.pop(f"{Q}.weight"), f"{Q}r.weight_scale": t.pop(f"{Q}.weight_scale")}),
        lambda t, c: c["quantization_config"].update(ignored_layers=[Q]),
        lambda t, c: c["quantization_config"].update(quant_method="mxdit_mxfp4"),
    ],
    ids=["no codes", "no scales", "float codes", "float scales", "another name", "config says float", "another method"],
)
def test_a_damaged_encoder_is_refused_where_transformers_would_make_up_numbers(change, packed, tmp_path):
    folder = _changed(packed, tmp_path, change)
    with pytest.raises((CheckpointError, RuntimeError)):
        UMT5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)


def test_a_weight_that_is_missing_or_no_number_is_refused_while_quantizing(packed, tmp_path):
    tensors = load_file(packed / "float" / "model.safetensors")
    (tmp_path / "config.json").write_text((packed / "float" / "config.json").read_text())
    weight = tensors.pop(f"{Q}.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not loaded"):
        UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=EncoderConfig("mxfp8"))
    weight[0, 0] = torch.nan
    save_file({**tensors, f"{Q}.weight": weight}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ModelError, RuntimeError, CheckpointError)):
        UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=EncoderConfig("mxfp8"))


def test_a_config_that_says_serialized_of_a_float_model_is_refused(packed):
    config = EncoderConfig({"quant_method": "mxfp8", "is_checkpoint_serialized": True})
    with pytest.raises(ConfigError, match="says that the checkpoint is quantized"):
        UMT5EncoderModel.from_pretrained(packed / "float", quantization_config=config)


def test_a_kind_of_model_without_a_spec_is_refused():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(ModelError, match="does not know this kind of model"):
        mxdit.plan(transformers.BertModel(config), "mxfp8")


@pytest.mark.parametrize("family", ["umt5", "t5"])
@pytest.mark.parametrize("both", [False, True], ids=["one name", "two names"])
def test_the_token_table_is_packed_once_and_looked_up(family, both, tmp_path):
    model = made(family, tmp_path / "float")
    if both:  # as older checkpoints have it
        tensors = load_file(tmp_path / "float" / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
        save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    config = EncoderConfig({"quant_method": "mxfp4", "embedding": "mxfp8"})
    online = loaded(model, tmp_path / "float", quantization_config=config)
    packed = mxdit.encode(model.shared.weight.data, "mxfp8")
    table = mxdit.decode(packed).to(torch.bfloat16)
    assert torch.equal(online.shared.packed().codes, packed.codes)
    for embedding in (online.shared, online.encoder.embed_tokens, online.get_input_embeddings()):
        assert torch.equal(embedding(IDS), table[IDS])
    names = [name for name in online.state_dict() if "shared" in name or "embed_tokens" in name]
    assert names == ["shared.weight", "shared.weight_scale"]
    row = mxdit.report_of(online).layers[0]
    assert (row.path, row.method, row.scheme, row.bytes_after) == ("shared", "mxfp8", "lookup", 99 * 66)

    online.save_pretrained(tmp_path / "packed")
    again = loaded(model, tmp_path / "packed")
    assert same(online, again) and torch.equal(output(again), output(online))
    mxdit.quantize_(model, {"quant_method": "mxfp4", "activation": "bf16", "embedding": "mxfp8"})
    assert same(model, online) and torch.equal(output(model), output(online))
    model.save_pretrained(tmp_path / "memory")
    assert same(loaded(model, tmp_path / "memory"), online)


def test_a_table_that_is_not_packed_is_refused(tmp_path):
    model = made("llama", tmp_path)
    with pytest.raises(ConfigError, match="packs no token table"):
        mxdit.plan(model, {"quant_method": "mxfp8", "embedding": "mxfp8"})
    with pytest.raises(ConfigError, match="unknown embedding"):
        EncoderConfig({"quant_method": "mxfp8", "embedding": "bf16"})
