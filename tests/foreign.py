"""Single files as ComfyUI takes them, of random codes, and the numbers that they mean: written by hand from the formats' texts.

Every number is worked out in float64 and rounded to FP32 where the format's definition has a rounding. The other tools' own
writers are held against mxdit in tests/interop/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import original
import tiny

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E4M3, E5M2 = (
    np.arange(256, dtype=np.uint8).view(t).astype(np.float64) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
Tensors = dict[str, Tensor]
KINDS = ("scaled", "scaled e5m2", "cast", "cast e5m2", "float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8")
LAYER = "blocks.0.self_attn.q"  # of the release's names


class File:
    """A file of one kind of layers.

    tensors  by the release's names, as they are stored.
    values   by the release's names, FP32 of what is decoded, the floats as they are.
    header   its metadata.
    """

    def __init__(self, kind: str, component: str = "transformer", *, header: bool = False) -> None:
        self.rng = np.random.default_rng(list(kind.encode()))
        self.model = original.transformer(component)
        self.tensors: Tensors = {}
        self.values: Tensors = {}
        self.scales: Tensors = {}  # layer -> row-major scales of MXFP8
        self.header: dict[str, str] = {}
        layers: dict[str, Any] = {}
        for name, tensor in original.state_dict(self.model).items():
            path, _, leaf = name.rpartition(".")
            if tensor.dim() == 2 and leaf == "weight" and name.startswith("blocks."):
                self._layer(path, kind, *tensor.shape)
                layers[path] = {"format": kind}
            else:
                self.tensors[name] = self.values[name] = tensor.bfloat16().contiguous()
        if kind.startswith("scaled"):
            self.tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        elif "cast" not in kind and header:
            self.header["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
        elif "cast" not in kind:
            for path, said in layers.items():
                self.say(path, **said)

    def say(self, path: str, **said: Any) -> None:
        """Give a layer this configuration."""
        self.tensors[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def save(self, path: Path, prefix: str = "") -> Path:
        """The file, each name behind a prefix."""
        header = self.header
        if prefix and header:
            said = json.loads(header["_quantization_metadata"])
            said["layers"] = {prefix + name: of for name, of in said["layers"].items()}
            header = {"_quantization_metadata": json.dumps(said)}
        save_file({prefix + name: tensor for name, tensor in self.tensors.items()}, path, header or None)
        return path

    def save_float(self, folder: Path) -> Path:
        """The same model as floats in diffusers' layout: FP32, of which each tensor is exactly what the file means."""
        ours = original.names(self.model.config.num_layers)
        values = {name: self.values[theirs].float() for name, theirs in ours.items()}
        self.model.load_state_dict(values)
        self.model.save_pretrained(folder)
        return folder

    def _layer(self, path: str, kind: str, n: int, k: int) -> None:
        weight, scale = f"{path}.weight", np.float32(self.rng.uniform(1e-5, 1e-4))
        if kind == "nvfp4":
            codes = self.rng.integers(0, 16, (n, k), dtype=np.uint8)
            blocks = self.rng.integers(0x08, 0x7F, (n, k // 16), dtype=np.uint8)
            total = (E4M3[blocks] * float(scale)).astype(np.float32)
            values = FP4[codes] * total.astype(np.float64).repeat(16, 1)
            self.tensors[weight] = torch.from_numpy(codes[:, 0::2] << 4 | codes[:, 1::2])
            self.tensors[f"{path}.weight_scale"] = tiled(torch.from_numpy(blocks)).view(torch.float8_e4m3fn)
            self.tensors[f"{path}.weight_scale_2"] = torch.tensor(scale)
            self.tensors[f"{path}.input_scale"] = torch.tensor(0.5)
        elif kind == "mxfp8":
            codes = self._codes(n, k, 0x7E)
            blocks = self.rng.integers(100, 120, (n, k // 32), dtype=np.uint8)
            values = E4M3[codes] * np.exp2(blocks.astype(np.float64) - 127).repeat(32, 1)
            self.tensors[weight] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            self.scales[path] = torch.from_numpy(blocks)
            self.tensors[f"{path}.weight_scale"] = tiled(self.scales[path])
        else:
            five = "e5m2" in kind
            top = {"cast": 0x76, "cast e5m2": 0x77}.get(kind, 0x7B if five else 0x7E)
            codes = self._codes(n, k, top)
            values = (E5M2 if five else E4M3)[codes]
            self.tensors[weight] = torch.from_numpy(codes).view(torch.float8_e5m2 if five else torch.float8_e4m3fn)
            if kind.startswith("cast"):
                values = values.astype(np.float64)
            else:
                values = values * float(scale)
                names = (
                    ("scale_weight", "scale_input") if kind.startswith("scaled") else ("weight_scale", "input_scale")
                )
                self.tensors |= {f"{path}.{names[0]}": torch.tensor(scale), f"{path}.{names[1]}": torch.tensor(1.0)}
        self.values[weight] = torch.from_numpy(values.astype(np.float32))

    def _codes(self, n: int, k: int, top: int) -> np.ndarray:
        magnitude = self.rng.integers(0, top + 1, (n, k), dtype=np.uint8)
        return magnitude | self.rng.integers(0, 2, (n, k), dtype=np.uint8) << 7


def tiled(scales: Tensor) -> Tensor:
    """(N, blocks) bytes in cuBLAS's order: tiles of 128 x 4, padded with zeros."""
    n, blocks = scales.shape
    rows, columns = -(-n // 128) * 128, -(-blocks // 4) * 4
    out = np.zeros(rows * columns, np.uint8)
    for r in range(n):
        for c in range(blocks):
            tile = r // 128 * (columns // 4) + c // 4
            out[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    return torch.from_numpy(out).view(rows, columns)


def from_single_file(file: Path, base: Path, config: Any) -> Any:
    return tiny.WanTransformer3DModel.from_single_file(
        str(file), config=str(base), quantization_config=config, torch_dtype=torch.bfloat16, local_files_only=True
    )
