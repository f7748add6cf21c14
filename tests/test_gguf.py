"""GGUF files and models, given to a quantizer of another kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

import mxdit
import tiny
from mxdit import CheckpointError, ModelError, MXConfig
from mxdit.numerics.formats import FORMATS

KIND = GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A float model in `bf16`, and its tensors in `model.gguf`, those of the linears in Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny.transformer().bfloat16()
    model.save_pretrained(folder / "bf16")
    writer = GGUFWriter(folder / "model.gguf", "wan")
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, quantize(values, KIND), raw_dtype=KIND)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def from_single_file(folder: Path, config: object) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_single_file(
        str(folder / "model.gguf"),
        config=str(folder / "bf16"),
        quantization_config=config,
        torch_dtype=torch.bfloat16,
        local_files_only=True,
    )


@pytest.mark.parametrize("method", FORMATS)
def test_a_file_is_named_for_what_it_is(folder, method):
    with pytest.raises(CheckpointError, match=r"the file is GGUF-quantized; got Q8_0; .*GGUFQuantizationConfig"):
        from_single_file(folder, MXConfig(method))


def test_an_index_that_lists_gguf_files(folder, tmp_path):
    shutil.copy(folder / "bf16" / "config.json", tmp_path)
    shutil.copy(folder / "model.gguf", tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny.transformer().state_dict(), "model.gguf")}
    (tmp_path / f"{tiny.WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model.gguf: the file is GGUF-quantized"):
        tiny.load(tmp_path, MXConfig("mxfp4"))


def test_a_model_that_was_loaded_from_one(folder):
    model = from_single_file(folder, GGUFQuantizationConfig(compute_dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"time_proj.weight: .*got a GGUFParameter of torch.uint8; .*\(GGUF, bits"):
        mxdit.quantize_(model, "mxfp4")
    assert len(mxdit.quantize_(model.dequantize(), "mxfp4").quantized) == tiny.BLOCKS * tiny.LINEARS
