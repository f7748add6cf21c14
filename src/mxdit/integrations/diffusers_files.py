"""Weights in codes that `from_single_file` hands over: FP8, NVFP4 and MXFP8 of ComfyUI's files, and GGUF.

diffusers reads the file whole, renames its tensors, and loads them one after another. Before that, each tensor in codes is
replaced by a stand-in without memory of the shape and dtype that it decodes to, which the host may cast and check as it likes;
the codes are decoded one at a time, when the host asks for the tensor to be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxdit.checkpoint.checks import check_e4m3, check_scale
from mxdit.checkpoint.coded import Decoded, decoded
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.gguf import tensor_of
from mxdit.errors import CheckpointError
from mxdit.numerics.formats import TensorInfo

PREFIX = "diffusion_model."  # the one of ComfyUI's prefixes that diffusers leaves in place


@dataclass(frozen=True)
class _Held:
    """A tensor in memory, as `Readable`."""

    file: Path
    name: str
    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def info(self) -> TensorInfo:
        return TensorInfo.of(self.tensor)

    def read(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Codes:
    """What a file holds in codes.

    values  tensor -> what decodes it.
    parts   layer -> the canonical tensors of an MXFP8 linear, which are taken as they are.
    """

    values: dict[str, Decoded]
    parts: dict[str, dict[str, Tensor]]


def take_codes(state_dict: dict[str, Any], methods: Mapping[str, str], where: str) -> Codes:
    """Take the tensors in codes out of a file's, and put stand-ins in their place.

    Args:
        state_dict: the file's tensors under the model's names; changed in place.
        methods: layer -> the method that it is quantized to; layers that are not quantized are not among them.
        where: the model, for errors.

    Raises CheckpointError for codes that mxdit does not read, and for MXFP8 layers that are to have another method.
    """
    if state_dict and all(name.startswith(PREFIX) for name in state_dict):
        for name in list(state_dict):
            state_dict[name.removeprefix(PREFIX)] = state_dict.pop(name)
    tensors: dict[str, Readable] = {name: _readable(name, tensor, where) for name, tensor in state_dict.items()}
    found = decoded(tensors, None, lambda path: path in methods, where)
    other = next((path for path, method in found.methods.items() if methods[path] != method), None)
    if other is not None:
        raise CheckpointError(
            "the file holds a layer that is quantized already",
            where=other,
            got=found.methods[other],
            expected=f"a float layer, to quantize it to {methods[other]}",
            hint='Load it with MXConfig("mxfp8"), or name such layers under layer_methods mxfp8: their codes are taken as they '
            "are. Or take a BF16 file.",
        )
    values = {name: tensor for name, tensor in found.tensors.items() if isinstance(tensor, Decoded)}
    parts: dict[str, dict[str, Tensor]] = {}
    for path in found.methods:
        codes, scale = (found.tensors[f"{path}.{leaf}"].read() for leaf in ("weight", "weight_scale"))
        parts[path] = {"weight": check_e4m3(codes, f"{path}.weight"), "weight_scale": check_scale(scale, path)}
        del values[f"{path}.weight_scale"], found.tensors[f"{path}.weight_scale"]
    for name in [name for name in state_dict if name not in found.tensors]:
        del state_dict[name]
    for name, tensor in values.items():
        state_dict[name] = torch.empty(tensor.info.shape, dtype=tensor.info.dtype, device="meta")
    for path, linear in parts.items():
        state_dict[f"{path}.weight"] = torch.empty(linear["weight"].shape, dtype=torch.bfloat16, device="meta")
    return Codes(values, parts)


def _readable(name: str, tensor: Any, where: str) -> Readable:
    kind = getattr(tensor, "quant_type", None)
    if kind is None:
        return _Held(Path(where), name, tensor)
    # diffusers' GGUFParameter: its class is only to be had with the gguf package.
    from gguf.quants import quant_shape_from_byte_shape

    data = tensor.detach().as_subclass(torch.Tensor).numpy()
    shape = quant_shape_from_byte_shape(tuple(data.shape), kind)
    return tensor_of(data, kind, tuple(shape), Path(where), name, data.nbytes)
