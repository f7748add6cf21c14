"""What the headers of a checkpoint's files say of its tensors, held against the model before any is read.

One record, `BlockFormat.tensors`, says what a quantized linear has. The faults of one tensor are made here for both who ask:
`canonical`, which lists them all, and a host's load, which stops at the first (`check_tensors`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mxdit.checkpoint.component import Fault
from mxdit.checkpoint.files import read_header
from mxdit.config import MXConfig
from mxdit.config.choices import near_names
from mxdit.errors import CheckpointError
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FLOATS, PARTS, BlockFormat, TensorInfo, block_format
from mxdit.quantize.preconditions import remedy

GGUF = "Load the file with from_single_file, or quantize it with `mxdit quantize`."


def missing(name: str, row: BlockFormat | None = None, *, fills: bool = True) -> Fault:
    """The fault of a tensor that is not there.

    Args:
        name: the tensor's.
        row: the format of the quantized linear that it belongs to, if it does.
        fills: whether a base would give it.
    """
    again = "Fetch or convert the checkpoint again"
    return Fault(
        name, "missing tensor", hint=f"{again}, or name its BF16 --base." if fills and not row else f"{again}."
    )


def unplaced(name: str, got: TensorInfo) -> Fault:
    """The fault of a tensor that the model has no place for."""
    return Fault(name, "a tensor that the model has no place for", got)


def misfit(
    name: str, got: TensorInfo, want: TensorInfo, row: BlockFormat | None = None, *, casts: bool = False
) -> Fault | None:
    """What is wrong with a tensor's shape or dtype, or None.

    Args:
        name: the tensor's.
        got: as it is stored.
        want: as the model has it.
        row: the format of the quantized linear that it belongs to; its tensors have one dtype only.
        casts: whether the reader casts the tensors of float layers, whatever they are.
    """
    if row:
        if got == want:
            return None
        return Fault(name, f"misshapen or mistyped tensor of a {row.name} layer", got, want)
    if got.dtype not in FLOATS and not casts:
        return Fault(name, "mistyped tensor", got, TensorInfo(want.shape, torch.bfloat16))
    return None if got.shape == want.shape else Fault(name, "misshapen tensor", got, want.shape)


def read_headers(files: Iterable[str], names: Iterable[str]) -> dict[str, TensorInfo | None]:
    """Tensor name -> info from the headers of safetensors files; for other files the `names` alone, each with None.

    Raises CheckpointError for a header that cannot be believed, and for GGUF files.
    """
    files = [str(file) for file in files]
    for file in files:
        if file.endswith(".gguf"):
            raise CheckpointError("the file is GGUF-quantized", where=file, expected="a float model", hint=GGUF)
    if not all(file.endswith(".safetensors") for file in files):
        return dict.fromkeys(names)
    found: dict[str, TensorInfo | None] = {}
    for file in files:
        found.update({name: tensor.info for name, tensor in read_header(Path(file)).items()})
    return found


def check_tensors(model: nn.Module, stored: Mapping[str, TensorInfo | None], config: MXConfig) -> None:
    """Raise CheckpointError unless `stored` is exactly what the skeleton `model` needs; diffusers only warns.

    Layers of ours must have their very dtypes; other tensors are cast by the host.
    """
    wanted = model.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    extra = [name for name in stored if name not in wanted and not any(re.search(pattern, name) for pattern in ignored)]
    absent = [name for name in wanted if name not in stored]
    where = type(model).__name__
    if absent:
        near = near_names(absent[0], extra)
        raise CheckpointError(
            f"{_count(absent)} missing from the checkpoint",
            where=where,
            expected=_some(absent),
            hint=remedy(extra, "saving") or " ".join(filter(None, [near, _hint(config, extra, absent)])),
        )
    if extra:
        raise CheckpointError(
            f"{_count(extra)} in the checkpoint that the model has no place for",
            where=where,
            got=_some(extra),
            hint=remedy(extra, "saving") or _hint(config, extra, absent),
        )
    rows = {path: block_format(m.method) for path, m in model.named_modules() if isinstance(m, MXLinear)}
    for name, info in stored.items():
        if info is None or name not in wanted:
            continue
        path, _, leaf = name.rpartition(".")
        row = rows.get(path) if leaf in PARTS else None
        fault = misfit(name, info, TensorInfo.of(wanted[name]), row, casts=True)
        if fault:
            hint = None
            if info.dtype == torch.float8_e4m3fn and (row.bits == 4 if row else config.quant_method != "mxfp8"):
                hint = (
                    "This is the numeric layout of vLLM-Omni and MindIE-SD, one FP4 value a byte: bring it into ours with "
                    "`mxdit convert`."
                )
            elif info.dtype in FLOATS and row:
                hint = "The layer is not quantized here: list it under ignored_layers in config.json, or convert again."
            raise replace(fault, hint=hint).error()


def adopt_dtypes(model: nn.Module, tensors: Mapping[str, TensorInfo | None]) -> None:
    """Give the parameters of a skeleton the dtypes of the file: without torch_dtype, the host casts to the skeleton's."""
    for name, parameter in list(model.named_parameters()):
        info = tensors.get(name)
        if info is not None and info.dtype != parameter.dtype:
            path, _, leaf = name.rpartition(".")
            empty = torch.empty_like(parameter, dtype=info.dtype)
            setattr(model.get_submodule(path), leaf, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _hint(config: MXConfig, extra: list[str], absent: list[str]) -> str:
    if not config.is_checkpoint_serialized and any(name.endswith(".weight_scale") for name in extra):
        return "The weights are quantized already: restore the quantization_config of its config.json."
    if config.is_checkpoint_serialized and any(name.endswith(("weight_scale", "mul_scale")) for name in absent):
        return "Its config.json lists other layers in ignored_layers than the files hold: convert the model again."
    return "The checkpoint is incomplete or of another model: download or convert it again."


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
