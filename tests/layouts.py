"""One tiny expert in every layout that holds one, and how to break it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch as library
import torch
from torch import Tensor

import original
import tiny
from command import mxdit_command
from mxdit.checkpoint import convert_checkpoint, quantize_checkpoint

Tensors = dict[str, Tensor]
Config = dict[str, Any]
Q, K, V = (f"blocks.0.attn1.to_{x}" for x in "qkv")
OUT, UP, DOWN = "blocks.0.attn1.to_out.0", "blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2"


def experts(root: Path) -> dict[str, Path]:
    """The expert in every layout, by name. Dual-scale is smoothed, and its first block's output stays float; "smooth" is
    single-scale."""
    tiny.transformer().bfloat16().save_pretrained(root / "float")
    original.save(root / "wan")
    shutil.move(root / "wan" / "high_noise_model", root / "original")
    dual = {"quant_method": "mxfp4_dualscale", "ignored_layers": [OUT]}
    single = {"quant_method": "mxfp4", "mxfp4_scale_alg": 0}
    configs = {"dual": dual, "mxfp4": single, "smooth": single, "mxfp8": "mxfp8"}
    for name, config in configs.items():
        quantize_checkpoint(root / "float", root / name, config).write()
    for name in ("dual", "smooth"):
        change(root / name, smooth)
    for name in configs:
        for to in ("vllm-omni", "sglang", "modelslim"):
            convert_checkpoint(root / name, root / f"{name} {to}", to).write()
    return {path.name: path for path in root.iterdir()}


def auto_round(packed: Path, out: Path, **said: Any) -> Path:
    """A packed expert as AutoRound writes it, `bits` those of most layers; `said` are more keys of its config."""
    tensors = {}
    config = json.loads((packed / "config.json").read_text())
    bits = 8 if config["quantization_config"]["quant_method"] == "mxfp8" else 4
    others = [path for paths in config["quantization_config"].get("layer_methods", {}).values() for path in paths]
    for name, tensor in library.load_file(packed / tiny.WEIGHTS).items():
        codes = tensor.dtype is torch.uint8 and name.endswith(".weight")
        eight = (bits == 8) != (name.removesuffix(".weight") in others)
        name = f"{name}_packed" if codes and not eight else name
        tensors[name] = tensor.view(torch.float8_e4m3fn) if codes and eight else tensor
    out.mkdir()
    library.save_file(tensors, out / tiny.WEIGHTS, {"format": "pt"})
    stated = {
        "quant_method": "auto-round",
        "data_type": "mx_fp",
        "act_data_type": "mx_fp",
        "group_size": 32,
        "sym": True,
    }
    config["quantization_config"] = {
        **stated,
        "bits": bits,
        "act_bits": bits,
        "packing_format": "auto_round:llm_compressor",
        **said,
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def smooth(tensors: Tensors) -> None:
    """Give every four-bit layer factors."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        path = name.removesuffix(".weight_scale")
        factors = torch.linspace(0.5, 2, 2 * tensors[f"{path}.weight"].shape[1]).bfloat16().float()
        tensors[f"{path}.mul_scale"] = factors


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    """Edit the tensors of a folder's one file."""
    file = next(folder.glob("*.safetensors"))
    tensors = library.load_file(file)
    edit(tensors)
    library.save_file(tensors, file, {"format": "pt"})


def change_json(file: Path, edit: Callable[[Config], Any]) -> None:
    """Edit a JSON file."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def inspect(monkeypatch: Any, capsys: Any, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mxdit inspect ARGS`."""
    return mxdit_command(monkeypatch, capsys, "inspect", *args)
