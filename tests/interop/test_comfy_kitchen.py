"""Files in ComfyUI's own layouts, made by comfy-kitchen: mxdit reads the numbers that its decoders give, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mxdit
import original
import peers
import tiny
from mxdit.checkpoint import convert_checkpoint, quantize_checkpoint
from mxdit.checkpoint.folders import open_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kitchen")
    model = original.transformer("transformer", ffn_dim=288)  # tiles that rows and columns do not fill
    model.save_config(root / "base")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in original.state_dict(model).items()}
    save_file(tensors, root / "source.safetensors")
    return root


@pytest.mark.parametrize("fmt", ["mxfp8", "nvfp4", "float8_e4m3fn"])
def test_what_its_decoder_gives(root, tmp_path, fmt):
    file, values = tmp_path / "made.safetensors", tmp_path / "values.safetensors"
    peers.kitchen(root / "source.safetensors", fmt, file, values)
    wanted = {ours: load_file(values)[theirs] for ours, theirs in original.names(tiny.BLOCKS).items()}
    if fmt == "mxfp8":
        convert_checkpoint(file, tmp_path / "packed", "packed", base=root / "base").write()
        state = {f"{p}.weight": mxdit.decode(m.packed()) for p, m in layers(tiny.load(tmp_path / "packed"))}
        assert len(state) == tiny.BLOCKS * tiny.LINEARS
        for name, weight in state.items():
            assert torch.equal(weight, wanted[name]), name
        theirs = load_file(file)
        codes = open_tensors(tmp_path / "packed")["blocks.1.ffn.net.2.weight"].read()
        assert torch.equal(codes, theirs["blocks.1.ffn.2.weight"].view(torch.uint8))
        return
    model = original.transformer("transformer", ffn_dim=288)
    model.load_state_dict({name: tensor.float() for name, tensor in wanted.items()})
    model.save_pretrained(tmp_path / "float")
    quantize_checkpoint(file, tmp_path / "a", "mxfp4", base=root / "base", dtype=torch.float32).write()
    quantize_checkpoint(tmp_path / "float", tmp_path / "b", "mxfp4", dtype=torch.float32).write()
    assert (tmp_path / "a" / tiny.WEIGHTS).read_bytes() == (tmp_path / "b" / tiny.WEIGHTS).read_bytes()


def layers(model: torch.nn.Module) -> list[tuple[str, mxdit.MXLinear]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, mxdit.MXLinear)]
