"""The other tools, each in a process of its own, and what the older of their layouts looked like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".interop"  # made by `make test-interop`, seen by the subprocesses only
MERGE_TOOLS = "vllm_omni/quantization/tools"
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.cat([FP4, -FP4]).to(torch.float8_e4m3fn)

# What `slim.py` is asked for, by the name of the directory.
RECIPES: dict[str, dict[str, Any]] = {
    "dual": {"method": "dual"},
    "dual-smoothed": {"method": "dual", "smooth": ["*"]},
    "dual-calibrated": {"method": "dual", "maxima": "maxima"},  # its own smoothing chooses the factors
    "dual-some-float": {
        "method": "dual",
        "smooth": ["blocks.0.cross_attn.*", "blocks.1.self_attn.*", "blocks.1.ffn.*"],
        "methods": dict.fromkeys(["blocks.0.self_attn.*", "blocks.0.ffn.*", "blocks.1.cross_attn.*"], "float"),
    },
    "dual-shards": {"method": "dual", "smooth": ["*.ffn.*"], "part": 1},
    "dual-ascendv1": {"method": "dual", "smooth": ["*_attn.*"], "saver": "ascendv1"},
    "single": {"method": "single"},
    "single-smoothed": {"method": "single", "smooth": ["blocks.1.*"]},
    "single-some-float": {
        "method": "single, searched",
        "methods": {"blocks.0.*": "float", "blocks.1.cross_attn.o": "float"},
    },
    "w4a8": {"method": "w4a8", "saver": "ascendv1"},
    "mxfp8": {"method": "mxfp8"},
    "mxfp8-some-float": {"method": "mxfp8, searched", "methods": {"blocks.1.*": "float"}},
    # Two methods in one expert.
    "single-and-mxfp8": {"method": "single, searched", "methods": {"blocks.0.*": "mxfp8, searched"}},
    "dual-and-mxfp8": {"method": "dual", "smooth": ["blocks.1.*"], "methods": {"blocks.0.*": "mxfp8"}},
    "mxfp8-and-w4a8": {"method": "mxfp8", "methods": {"blocks.1.cross_attn.*": "w4a8"}, "saver": "ascendv1"},
    # What has no place in a packed expert, wholly or in part.
    "dual-float-smoothed": {
        "method": "dual",
        "smooth": ["*"],
        "methods": {"blocks.0.self_attn.[qkv]": "float", "blocks.1.ffn.2": "float"},
    },
    "dual-mxfp8-smoothed": {"method": "dual", "smooth": ["*"], "methods": {"blocks.0.*": "mxfp8"}},
    # As the public Wan2.2 recipe: the first blocks in MXFP8, and marks of quantized attention.
    "public": {"method": "single, searched", "methods": {"blocks.0.*": "mxfp8, searched"}, "attention": True},
}


def msmodelslim(source: Path, out: Path) -> None:
    """Every recipe over the experts in `source`, each to its own directory of `out`; `out/maxima` is what "maxima" stands for."""
    recipes = [{**recipe, "source": str(source), "out": str(out / name)} for name, recipe in RECIPES.items()]
    for recipe in recipes:
        if "maxima" in recipe:
            recipe["maxima"] = str(out / recipe["maxima"])
    (out / "maxima").mkdir(parents=True)
    for folder in source.iterdir():
        save_file(maxima_of(folder), out / "maxima" / f"{folder.name}.safetensors")
    (out / "recipes.json").write_text(json.dumps(recipes))
    _run(Path(__file__).with_name("slim.py"), out / "recipes.json")


def maxima_of(expert: Path) -> dict[str, torch.Tensor]:
    """Magnitudes over two octaves for the inputs of each linear in the blocks, the same for those that share them."""
    maxima = {}
    for file in sorted(expert.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            path, _, leaf = name.rpartition(".")
            if path.startswith("blocks.") and leaf == "weight" and tensor.dim() == 2:
                maxima[path] = torch.linspace(0, 2, tensor.shape[1]).exp2().bfloat16()
    return maxima


def merged(tool: str, base: Path, quantized: Path, out: Path) -> Path:
    """What one of vLLM-Omni's own merge tools makes."""
    args = ("--model-type", "Wan2.2-T2V-A14B", "--original-model", base, "--quant-path", quantized)
    _run(PEERS / MERGE_TOOLS / f"{tool}.py", *args, "--output-path", out)
    return out


def kitchen(source: Path, fmt: str, made: Path, decoded: Path) -> None:
    """A single file in one of ComfyUI's formats, and what comfy-kitchen decodes it to, of a file of floats."""
    _run(Path(__file__).with_name("kitchen.py"), source, fmt, made, decoded)


def numeric(quantized: Path, out: Path) -> Path:
    """The same directory as tools wrote it before they packed: each FP4 value as one float8_e4m3fn."""
    shutil.copytree(quantized, out)
    for file in out.glob("*_noise_model/*.safetensors"):
        tensors = load_file(file)
        for name, codes in tensors.items():
            if name.endswith(".weight") and codes.dtype is torch.uint8:
                nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
                tensors[name] = CODES.view(torch.uint8)[nibbles].view(torch.float8_e4m3fn)
        save_file(tensors, file)
    return out


def require_peers() -> None:
    """Fail, never skip: these tests mean nothing without the other tools."""
    absent = [name for name in ("msmodelslim", f"{MERGE_TOOLS}") if not (PEERS / name).is_dir()]
    if absent:
        pytest.fail(f"{PEERS}/{absent[0]} is missing: run `make test-interop`", pytrace=False)


def _run(script: Path, *args: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PEERS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(f"{script.name} ended with {done.returncode}:\n{done.stderr[-4000:]}", pytrace=False)
