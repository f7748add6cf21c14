"""Pipelines saved with `variant=`: read as they are, and written under plain names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import tiny
from command import mxdit_command
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint, quantize_checkpoint
from mxdit.checkpoint.folders import choose_variant, plain_name, variant_of
from mxdit.errors import InputError
from mxdit.generation import loading
from mxdit.generation.directory import open_model

pytestmark = pytest.mark.slow


def saved(folder: Path, **kwargs: Any) -> Path:
    """The pipeline in FP16; transformers and text encoder in shards that an index lists."""
    pipe = tiny.pipeline(dtype=torch.float16)
    pipe.save_pretrained(folder, max_shard_size="150KB", **kwargs)
    for file in (folder / "text_encoder").glob("*.safetensors"):
        file.unlink()
    pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="15KB", **kwargs)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain") / "wan")


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, as diffusers and transformers name those of a variant."""
    folder = saved(tmp_path_factory.mktemp("fp16") / "wan", variant="fp16")
    assert {variant_of(file.name) for file in folder.glob("*/*.safetensors*")} == {"fp16"}
    indexed = {file.parent.name for file in folder.glob("*/*.index.fp16.json")}
    assert indexed == {"transformer", "transformer_2", "text_encoder"}
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by its path inside."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def quantized(source: Path, destination: Path, **options: Any) -> Path:
    quantize_checkpoint(source, destination, {"quant_method": "mxfp4", "mxfp4_scale_alg": 0}, **options).write()
    return destination


NAMES = {
    "diffusion_pytorch_model.safetensors": (None, "diffusion_pytorch_model.safetensors"),
    "diffusion_pytorch_model.fp16.safetensors": ("fp16", "diffusion_pytorch_model.safetensors"),
    "model.bf16-00001-of-00002.safetensors": ("bf16", "model-00001-of-00002.safetensors"),
    "model-00001-of-00002.fp16.safetensors": ("fp16", "model-00001-of-00002.safetensors"),
    "model-00001-of-00002.safetensors": (None, "model-00001-of-00002.safetensors"),
    "model.safetensors.index.non_ema.json": ("non_ema", "model.safetensors.index.json"),
    "model.safetensors.fp16.index.json": ("fp16", "model.safetensors.index.json"),
    "pytorch_model.fp16.bin": ("fp16", "pytorch_model.bin"),
    "pytorch_model.bin.index.json": (None, "pytorch_model.bin.index.json"),
    "quant_model_weight_mxfp4.safetensors": (None, "quant_model_weight_mxfp4.safetensors"),
    "wan2.2_t2v.safetensors": (None, "wan2.2_t2v.safetensors"),
    "model.fp16.v2.safetensors": (None, "model.fp16.v2.safetensors"),
    "model_index.json": (None, "model_index.json"),
}


def test_what_names_say_of_a_variant():
    assert {name: (variant_of(name), plain_name(name)) for name in NAMES} == NAMES


def test_the_one_variant_is_found_and_plain_names_are_written(plain, fp16, tmp_path):
    ours, theirs = quantized(fp16, tmp_path / "fp16"), quantized(plain, tmp_path / "plain")
    assert contents(ours).keys() == contents(theirs).keys()
    for name, data in contents(theirs).items():
        if name.endswith(".json"):
            assert json.loads((ours / name).read_bytes()) == json.loads(data), name
        else:
            assert (ours / name).read_bytes() == data, name
    pipe = WanPipeline.from_pretrained(ours, torch_dtype=torch.bfloat16)
    expected = WanPipeline.from_pretrained(theirs, torch_dtype=torch.bfloat16)
    assert np.array_equal(tiny.generate(pipe), tiny.generate(expected))
    assert inspect_checkpoint(ours).clean and inspect_checkpoint(fp16).clean


def test_a_directory_with_both_is_read_from_the_plain_files_unless_told(fp16, tmp_path):
    bf16 = tiny.save(tmp_path / "bf16")
    both = shutil.copytree(bf16, tmp_path / "both")
    shutil.copytree(fp16, both, dirs_exist_ok=True)
    weights = {}
    for variant, source in ((None, bf16), ("fp16", fp16)):
        made = contents(quantized(both, tmp_path / f"{variant}", variant=variant))
        alone = contents(quantized(source, tmp_path / f"{variant} alone"))
        weights[variant] = {name: data for name, data in made.items() if not name.endswith(".json")}
        assert made.keys() == alone.keys() and all(alone[name] == data for name, data in weights[variant].items())
    assert weights[None] != weights["fp16"]
    assert choose_variant(both) is None and choose_variant(both, "fp16") == "fp16"
    for variant, source in ((None, bf16), ("fp16", fp16)):
        one, other = (
            loading.load(open_model(path), "t2v", {}, variant=v) for path, v in ((both, variant), (source, None))
        )
        assert tiny.same(one.transformer, other.transformer)


def test_generate_loads_the_variant(monkeypatch, capsys, fp16, tmp_path):
    arguments = ["--steps", 1, "--size", "16x16", "--frames", 5, "-o", tmp_path / "a.mp4", "--prompt", "a red seven"]
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", fp16, *arguments)
    assert code == 0 and (tmp_path / "a.mp4").stat().st_size, err
    code, _, err = mxdit_command(monkeypatch, capsys, "generate", fp16, *arguments, "--variant", "bf16")
    assert code == 2 and "no weights of this variant; got bf16; expected fp16" in err


def test_a_base_in_a_variant(plain, fp16, tmp_path):
    packed = quantized(plain, tmp_path / "packed")
    expert = packed / "transformer"
    for number, variant in enumerate((None, "fp16")):
        convert_checkpoint(
            expert, tmp_path / str(number), "vllm-omni", base=fp16 / "transformer", variant=variant
        ).write()
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
    with pytest.raises(InputError, match="no weights of this variant; got bf16"):
        convert_checkpoint(expert, tmp_path / "none", "vllm-omni", base=fp16 / "transformer", variant="bf16")


COMMANDS: dict[str, list[Any]] = {
    "quantize": ["OUT", "--method", "mxfp4"],
    "convert": ["OUT"],
    "inspect": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_choice_that_cannot_be_made_is_one_line(monkeypatch, capsys, fp16, tmp_path, command):
    source = shutil.copytree(fp16, tmp_path / "two")
    for file in list((source / "transformer").glob("*.safetensors*")):
        text = file.read_bytes().replace(b".fp16", b".bf16") if file.suffix == ".json" else file.read_bytes()
        (source / "transformer" / file.name.replace("fp16", "bf16")).write_bytes(text)
    rest = [tmp_path / "out" if word == "OUT" else word for word in COMMANDS[command]]
    code, out, err = mxdit_command(monkeypatch, capsys, command, source, *rest)
    assert code == 2 and not out and err.count("\n") == 1
    assert "in more than one variant; got bf16, fp16. Name one of them" in err
    code, out, err = mxdit_command(monkeypatch, capsys, command, source, *rest, "--variant", "int8")
    assert code == 2 and not out and err.count("\n") == 1 and "got int8; expected bf16 or fp16" in err
    code, _, err = mxdit_command(monkeypatch, capsys, command, source, *rest, "--variant", "bf16")
    assert code == 2 and "text_encoder: no weights of this variant; got bf16; expected fp16" in err
    code, _, err = mxdit_command(monkeypatch, capsys, command, source, *rest, "--variant", "fp16")
    assert code == (2 if command == "convert" else 0)
    assert command != "convert" or "the checkpoint is not quantized" in err
