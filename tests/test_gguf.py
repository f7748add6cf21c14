"""GGUF files, decoded by the gguf package and held against diffusers' own decoder; and models that were loaded from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import quantize

import foreign
import mxdit
import original
import tiny
from command import mxdit_command
from mxdit import CheckpointError, ModelError, MXConfig
from mxdit.checkpoint import gguf as reader
from mxdit.checkpoint import inspect_checkpoint, quantize_checkpoint
from mxdit.errors import InputError

Kind = GGMLQuantizationType
WRITTEN = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.BF16, Kind.F16, Kind.F32)
RANDOM = (
    Kind.Q2_K,
    Kind.Q3_K,
    Kind.Q4_K,
    Kind.Q5_K,
    Kind.Q6_K,
    Kind.IQ4_XS,
    Kind.IQ4_NL,
)  # which the package only decodes
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,)}  # where a block's FP16 scales lie; else at 0 and 2
SIZE = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 512,
    "num_layers": 1,
}  # rows of whole blocks of 256


def model_of() -> WanTransformer3DModel:
    return tiny.transformer(rope_max_seq_len=1024, **SIZE)


def write(
    path: Path,
    kind: Kind,
    *,
    architecture: str | None = "wan",
    reshaped: bool = False,
    names: str = "release",
    lacks: str = "",
    endianess: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """The tiny model as city96's converter and llama.cpp's quantizer write one: linears of `kind`, the rest in F32."""
    writer = GGUFWriter(path, architecture or "wan", endianess=endianess)
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    rng = np.random.default_rng(int(kind))
    model = model_of()
    tensors = original.state_dict(model) if names == "release" else model.state_dict()
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name == lacks:
            continue
        if name.startswith("blocks.") and tensor.dim() == 2 and name.endswith(".weight"):
            data = blocks(rng, kind, *values.shape) if kind in RANDOM else quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        elif tensor.dim() == 5 and reshaped:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in values.shape])
            writer.add_tensor(name, values.reshape(values.shape[0], -1))
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(rng: np.random.Generator, kind: Kind, n: int, k: int) -> np.ndarray:
    """Random codes under small scales."""
    size, nbytes = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (n, k // size, nbytes), dtype=np.uint8)
    two = (0,) if kind in (Kind.IQ4_XS, Kind.IQ4_NL) else (0, 2)
    for at in SCALES.get(kind, two):
        scale = rng.uniform(1e-5, 1e-4, (n, k // size, 1)).astype(np.float16)
        data[:, :, at : at + 2] = scale.view(np.uint8)
    return data.reshape(n, -1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "base"
    model_of().save_config(folder)
    return folder


def decoded(file: Path, base: Path) -> WanTransformer3DModel:
    """What diffusers' own decoder makes of a file, in FP32 as far as it goes."""
    kept: Any = foreign.from_single_file(file, base, GGUFQuantizationConfig(compute_dtype=torch.float32))
    model = model_of()
    state = {}
    for name, tensor in kept.state_dict().items():
        codes = hasattr(tensor, "quant_type")
        state[name] = dequantize_gguf_tensor(tensor).float() if codes else tensor.float()
    model.load_state_dict(state)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WRITTEN, *RANDOM], ids=lambda kind: kind.name)
def test_each_type_as_diffusers_decodes_it(base, tmp_path, kind):
    file = write(tmp_path / "model.gguf", kind)
    tensors, texts = reader.read_gguf(file)
    ours = {WAN_NAMES[name]: tensor.read() for name, tensor in tensors.items()}
    assert texts["general.architecture"] == "wan"
    for name, want in decoded(file, base).state_dict().items():
        # diffusers computes in FP16, the type of the scales, and casts the rest to BF16.
        assert (ours[name].float() - want).abs().max() <= want.abs().max() * 2**-8, name
    linear = tensors["blocks.0.self_attn.q.weight"]
    exact = {Kind.BF16: torch.bfloat16, Kind.F16: torch.float16, Kind.F32: torch.float32}
    assert linear.info.dtype is exact.get(kind, torch.float32) and linear.exact is (kind in exact)


def test_q8_0_and_q4_0_by_hand(tmp_path):
    weight = original.state_dict(model_of())["blocks.0.ffn.0.weight"].numpy()
    for kind in (Kind.Q8_0, Kind.Q4_0):
        made = reader.read_gguf(write(tmp_path / f"{kind.name}.gguf", kind))[0]["blocks.0.ffn.0.weight"].read()
        data = quantize(weight, kind).reshape(512, 256 // 32, -1)
        scale = data[:, :, :2].copy().view(np.float16).astype(np.float64)
        if kind is Kind.Q8_0:
            codes = data[:, :, 2:].view(np.int8).astype(np.float64)
        else:
            codes = np.concatenate([data[:, :, 2:] & 15, data[:, :, 2:] >> 4], -1).astype(np.float64) - 8
        assert np.array_equal(made.numpy(), (scale * codes).reshape(512, 256).astype(np.float32))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.F16], ids=lambda kind: kind.name)
def test_a_file_is_quantized_as_what_it_decodes_to(monkeypatch, capsys, base, tmp_path, kind):
    file = write(tmp_path / "model.gguf", kind, reshaped=True)
    model = model_of()
    model.load_state_dict({WAN_NAMES[name]: tensor.read() for name, tensor in reader.read_gguf(file)[0].items()})
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(tmp_path / "float", tmp_path / "a", "mxfp4").write()
    code, _, err = mxdit_command(
        monkeypatch, capsys, "quantize", file, tmp_path / "b", "--method", "mxfp4", "--base", base
    )
    assert code == 0, err
    assert (tmp_path / "a" / tiny.WEIGHTS).read_bytes() == (tmp_path / "b" / tiny.WEIGHTS).read_bytes()
    (expert,) = inspect_checkpoint(file, base).components
    how = "read exactly" if kind is Kind.F16 else "decoded"
    assert (
        not expert.faults
        and expert.layout == "gguf"
        and re.search(f"{how}: 10 GGUF {kind.name}", "\n".join(expert.about))
    )
    if kind is not Kind.F16:  # a file whose convolution is whole, which diffusers reads, too
        file = write(tmp_path / "whole.gguf", kind)
        loaded = foreign.from_single_file(file, base, MXConfig("mxfp4"))
        assert tiny.same(loaded, tiny.load(tmp_path / "float", MXConfig("mxfp4")))


def test_diffusers_names_and_no_architecture(base, tmp_path):
    ours = write(tmp_path / "a.gguf", Kind.Q8_0, names="diffusers", architecture=None)
    theirs = write(tmp_path / "b.gguf", Kind.Q8_0)
    for file in (ours, theirs):
        quantize_checkpoint(file, tmp_path / file.stem, "mxfp8", base=base).write()
    assert (tmp_path / "a" / tiny.WEIGHTS).read_bytes() == (tmp_path / "b" / tiny.WEIGHTS).read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_files_that_are_refused(monkeypatch, base, tmp_path):
    def fails(file: Path, match: str, error: type[mxdit.MXDiTError] = CheckpointError) -> None:
        with pytest.raises(error, match=match):
            quantize_checkpoint(file, tmp_path / "out", "mxfp4", base=base)

    good = write(tmp_path / "good.gguf", Kind.Q8_0)
    fails(
        write(tmp_path / "a.gguf", Kind.Q8_0, architecture="flux"), "another architecture; got 'flux'; expected 'wan'"
    )
    fails(
        write(tmp_path / "b.gguf", Kind.Q8_0, lacks="patch_embedding.weight"),
        r"lacks what tells its model's size|patch_embedding.weight: missing tensor",
    )
    whole = good.read_bytes()
    for name, data in {"cut": whole[:-4096], "head": whole[:200], "empty": b"", "text": b"hello" * 100}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        fails(tmp_path / f"{name}.gguf", f"{name}.gguf: not a GGUF file, or a damaged one")
    fails(write(tmp_path / "big.gguf", Kind.Q8_0, endianess=GGUFEndian.BIG), "machines of the other byte order")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    fails(good, r"gguf: a package is not installed. GGUF files need it: pip install 'mxdit\[gguf\]'", InputError)


def test_a_type_that_the_package_does_not_decode(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"x.gguf: w: a GGUF type that the gguf package does not decode; got Q8_K"
    ):
        reader.tensor_of(np.zeros((1, 292), np.uint8), Kind.Q8_K, (1, 256), Path("x.gguf"), "w", 292)


def test_values_that_are_no_numbers(tmp_path):
    data = np.zeros((1, 34), np.uint8)
    data[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    data[0, 2] = 1
    tensor = reader.tensor_of(data, Kind.Q8_0, (1, 32), Path("x.gguf"), "w", 34)
    with pytest.raises(CheckpointError, match=r"x.gguf: w: codes that mean infs or NaNs"):
        tensor.read()


def test_an_index_that_lists_gguf_files(tmp_path):
    tiny.transformer().save_config(tmp_path)
    write(tmp_path / "model.gguf", Kind.Q8_0)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny.transformer().state_dict(), "model.gguf")}
    (tmp_path / f"{tiny.WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model.gguf: the file is GGUF-quantized; .*from_single_file"):
        tiny.load(tmp_path, MXConfig("mxfp4"))


def test_a_model_that_was_loaded_from_one(base, tmp_path):
    file = write(tmp_path / "model.gguf", Kind.Q8_0)
    model: Any = foreign.from_single_file(file, base, GGUFQuantizationConfig(compute_dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"to_q.weight: .*got a GGUFParameter of torch.uint8; .*\(GGUF, bits"):
        mxdit.quantize_(model, "mxfp4")
    assert len(mxdit.quantize_(model.dequantize(), "mxfp4").quantized) == tiny.LINEARS


WAN_NAMES = {theirs: ours for ours, theirs in original.names(1).items()}
