"""Packed text encoders on disk: `mxdit quantize --text-encoder`, inspect, convert, info, and sessions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

import mxdit
from command import mxdit_command
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.cli.console import read_keys
from mxdit.config.encoders import encoder_config
from mxdit.errors import CheckpointError, ConfigError, InputError
from mxdit.generation.directory import bundled, describe_encoders, open_model

SOURCE = bundled("t2v")
MXFP8 = {"text_encoder": encoder_config("mxfp8", "text_encoder")}
OUT = "encoder.block.0.layer.0.SelfAttention.o"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(SOURCE, folder, "mxfp4", encoders=MXFP8).write()
    return folder


@pytest.mark.slow
def test_streaming_and_loading_give_the_same_bytes(packed, tmp_path):
    """Names, bytes and what config.json states; and the tied table is written once."""
    config = mxdit.pipeline_config("mxfp4", text_encoder="mxfp8")
    pipe = WanPipeline.from_pretrained(SOURCE, torch_dtype=torch.bfloat16, quantization_config=config)
    pipe.save_pretrained(tmp_path)
    ours, theirs = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (packed, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    stated = [
        json.loads((folder / "text_encoder" / "config.json").read_text())["quantization_config"]
        for folder in (packed, tmp_path)
    ]
    assert stated[0] == stated[1]
    again = WanPipeline.from_pretrained(packed, torch_dtype=torch.bfloat16)
    for name, tensor in pipe.text_encoder.state_dict().items():
        assert torch.equal(tensor, again.text_encoder.state_dict()[name])


def test_without_a_config_the_text_encoder_is_carried_over(tmp_path):
    plan = quantize_checkpoint(SOURCE, tmp_path / "model", "mxfp4")
    assert "text_encoder/model.safetensors" in plan.carried
    plan = quantize_checkpoint(SOURCE, tmp_path / "model", "mxfp4", encoders=MXFP8)
    assert not any(name.startswith("text_encoder/") for name in plan.carried)
    assert [component.component for component in plan.components][-1] == "text_encoder"


def test_a_text_encoder_alone_may_be_packed(tmp_path):
    overrides = {"transformer": None, "transformer_2": None}
    with pytest.raises(ConfigError, match="every component is left unquantized"):
        quantize_checkpoint(SOURCE, tmp_path / "model", "mxfp4", overrides)
    plan = quantize_checkpoint(SOURCE, tmp_path / "model", "mxfp4", overrides, encoders=MXFP8)
    assert [set(component.methods.values()) for component in plan.components] == [{None}, {None}, {"mxfp8"}]


def test_what_is_no_text_encoder_that_is_packed_is_refused(packed, tmp_path):
    with pytest.raises(ConfigError, match="no text encoder that mxdit packs"):
        quantize_checkpoint(SOURCE, tmp_path / "model", "mxfp4", encoders={"text_encoder_2": MXFP8["text_encoder"]})
    source = tmp_path / "half"
    shutil.copytree(SOURCE, source)
    shutil.rmtree(source / "text_encoder")
    shutil.copytree(packed / "text_encoder", source / "text_encoder")
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(source, tmp_path / "model", "mxfp4", encoders=MXFP8)
    plan = quantize_checkpoint(source, tmp_path / "model", "mxfp4")
    assert "text_encoder/model.safetensors" in plan.carried  # as it is


def test_inspect_and_info_show_it_and_convert_carries_it(packed, tmp_path):
    found = inspect_checkpoint(packed)
    encoder = found.components[-1]
    assert found.clean and encoder.component == "text_encoder" and encoder.linears == {"mxfp8": 14}
    assert encoder.loaders == {"transformers + mxdit": None}
    assert [c.component for c in inspect_checkpoint(SOURCE).components] == ["transformer", "transformer_2"]
    row = describe_encoders(open_model(packed))["text_encoder"]
    assert (row["quant_method"], row["schemes"], row["kept"]) == ("mxfp8", {"w8a16": 14}, 0)
    with pytest.raises(
        InputError, match=r"would be lost.*text_encoder: its packed weights, which transformers without mxdit"
    ):
        convert_checkpoint(packed, tmp_path / "vllm", "vllm-omni")
    plan = convert_checkpoint(packed, tmp_path / "vllm", "vllm-omni", allow_loss=True)
    assert plan.carried["text_encoder/model.safetensors"] == packed / "text_encoder" / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.pop(f"{OUT}.weight_scale"), "missing tensor"),
        (lambda t, c: t.update({f"{OUT}.weight_scale": t[f"{OUT}.weight_scale"][:, :1].clone()}), "misshapen"),
        (lambda t, c: t[f"{OUT}.weight"].view(-1)[5:6].fill_(0x7F), "NaN"),
        (lambda t, c: t[f"{OUT}.weight_scale"].view(-1)[5:6].fill_(0xFF), "NaN"),
        (lambda t, c: t.pop("shared.weight"), "missing tensor"),
        (lambda t, c: t.update(stranger=torch.ones(3)), "no place for"),
        (lambda t, c: c["quantization_config"].update(ignored_layers=[OUT]), "ignored_layers lists other layers"),
    ],
)
def test_inspect_refuses_what_is_wrong(change, said, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    folder = tmp_path / "model" / "text_encoder"
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "model")
    faults = [str(fault) for fault in found.components[-1].faults]
    assert not found.clean and any(said in fault for fault in faults), faults
    assert not any(component.faults for component in found.components[:-1])


@pytest.mark.slow
def test_a_session_quantizes_it_and_one_that_is_packed_gives_the_same_frames(packed):
    def frames(session):
        request = session.request(steps=2, frames=5, seed=3)
        return session.run(request).frames

    online = mxdit.Session.open(method="mxfp4", components={"text_encoder": "mxfp8"})
    offline = mxdit.Session.open(packed)
    assert len(online.encoder_reports()["text_encoder"].quantized) == 14
    assert (frames(online) == frames(offline)).all()
    assert offline.encoder_reports() == online.encoder_reports()
    assert set(online.reports()) == {"transformer", "transformer_2"}


def test_a_session_refuses_a_text_encoder_that_there_is_none_of_or_that_is_packed(packed):
    with pytest.raises(ConfigError, match="a text encoder that the model does not have"):
        mxdit.Session.open(components={"text_encoder_2": "mxfp8"})
    with pytest.raises(ConfigError, match="stored quantized"):
        mxdit.Session.open(packed, components={"text_encoder": "mxfp4"})


@pytest.mark.slow
def test_a_packed_token_table_streams_inspects_and_loads(tmp_path):
    keys = {"quant_method": "mxfp4", "embedding": "mxfp8"}
    folder = tmp_path / "model"
    quantize_checkpoint(
        SOURCE, folder, "mxfp4", encoders={"text_encoder": encoder_config(keys, "text_encoder")}
    ).write()
    config = mxdit.pipeline_config("mxfp4", transformer=None, transformer_2=None, text_encoder=keys)
    pipe = WanPipeline.from_pretrained(SOURCE, torch_dtype=torch.bfloat16, quantization_config=config)
    stored, held = load_file(folder / "text_encoder" / "model.safetensors"), pipe.text_encoder.state_dict()
    assert stored.keys() == held.keys() and all(torch.equal(stored[name], held[name]) for name in held)
    found = inspect_checkpoint(folder)
    assert found.clean and found.components[-1].linears == {"mxfp4": 14, "mxfp8 embedding": 1}
    stored["shared.weight_scale"][3, 0] = 0xFF
    save_file(stored, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    assert "NaN" in str(inspect_checkpoint(folder).components[-1].faults[0])


def test_an_evaluation_has_modes_of_text_encoders():
    from mxdit.evals.modes import choose

    alone, both = choose([], ['a={"text_encoder": "mxfp8"}', 'b={"quant_method": "mxfp4", "text_encoder": "mxfp4"}'])[
        1:
    ]
    assert (alone.method, alone.components) == (None, {"text_encoder": "mxfp8"})
    assert (both.method, both.components) == ("mxfp4", {"text_encoder": "mxfp4"})
    with pytest.raises(ConfigError, match="unknown quant_method"):
        choose([], ['c={"text_encoder": "mxfp9"}'])


@pytest.mark.slow
def test_an_evaluation_tells_the_embeddings_error(tmp_path):
    from mxdit.evals.cache import Cache
    from mxdit.evals.run import Run
    from mxdit.evals.settings import Settings

    settings = Settings.choose(
        open_model(SOURCE),
        modes=[],
        custom=['te={"text_encoder": "mxfp8"}', 'te4={"text_encoder": "mxfp4"}'],
        count=1,
        seeds=1,
        probes=1,
        request={"steps": 2, "frames": 5},
        metrics=("psnr_db",),
    )
    modes = {mode["name"]: mode for mode in Run(settings, Cache(tmp_path)).results()["modes"]}
    errors = {name: mode["summary"].get("embedding_error") for name, mode in modes.items()}
    assert errors["bf16"] is None and modes["te"]["same_as"] is None
    assert 0.005 < errors["te"]["mean"] < 0.05 < errors["te4"]["mean"] < 0.2
    assert modes["te"]["summary"]["velocity_error"]["mean"] == 0  # transformers in BF16, given BF16's own calls


@pytest.mark.parametrize(
    "config, option",
    [
        (None, '{"quant_method": "mxfp4", "embedding": "mxfp8"}'),
        ('{"text_encoder": {"embedding": "mxfp8"}}', "mxfp4"),
        ('{"text_encoder": "mxfp4"}', '{"embedding": "mxfp8"}'),
        ('{"text_encoder": {"quant_method": "mxfp4", "embedding": "mxfp8"}}', None),
    ],
)
def test_the_option_takes_a_method_or_keys(config, option):
    assert read_keys(config, option) == ({}, {"text_encoder": {"quant_method": "mxfp4", "embedding": "mxfp8"}})


@pytest.mark.parametrize(
    "args, message",
    [
        (("mxfp9",), "error: text_encoder: unknown quant_method; got 'mxfp9'; expected one of mxfp4"),
        (('{"quant_method": "mxfp4", "embeding": "mxfp8"}',), "error: text_encoder: unknown key; got 'embeding'"),
        (('{"quant_method": ',), "error: --text-encoder: not JSON"),
        (('{"embedding": "mxfp8"}',), "error: text_encoder: no config for a text encoder"),
        (("mxfp8", "--config", '{"text_encoder": "mxfp4"}'), "error: --text-encoder: --config says it, too; got"),
        (("mxfp8", "--config", '{"text_encoder": ["mxfp4"]}'), "error: --text-encoder: --config says it, too; got"),
    ],
)
def test_what_the_option_does_not_take(monkeypatch, capsys, tmp_path, args, message):
    code, out, err = mxdit_command(
        monkeypatch, capsys, "quantize", SOURCE, tmp_path / "out", "--method", "mxfp4", "--text-encoder", *args
    )
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith(message), err
