"""GGUF files: their tensors, each decoded by the `gguf` package when it is read.

Sources of the facts: the package's `GGUFReader` and `quants.dequantize`; city96's ComfyUI-GGUF (`loader.py`), whose writers put
the shape of a tensor that they had to reshape into `comfy.gguf.orig_shape.NAME`.
"""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxdit.checkpoint.coded import Decoded
from mxdit.checkpoint.files import brief, is_name
from mxdit.errors import CheckpointError, InputError
from mxdit.numerics.formats import TensorInfo

# What the package's reader and decoder raise for a file that is not what it says.
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, AttributeError)
EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def need_gguf() -> None:
    """Raise InputError without the `gguf` package."""
    if find_spec("gguf") is None:
        raise InputError(
            "a package is not installed", where="gguf", hint="GGUF files need it: pip install 'mxdit[gguf]'."
        )


def read_gguf(path: Path) -> tuple[dict[str, Decoded], dict[str, str]]:
    """The tensors of a GGUF file by name, and its text metadata. Headers are read, data when a tensor is.

    Raises:
        InputError: the `gguf` package is not installed.
        CheckpointError: the file is damaged, or has a type that the package does not decode.
    """
    need_gguf()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(os.fspath(path))
        if reader.byte_order != "I":  # the package turns plain numbers, and not those inside of blocks
            raise CheckpointError(
                "a GGUF file for machines of the other byte order", where=str(path), hint="Convert it to this one's."
            )
        texts = {
            key: _text(field) for key, field in reader.fields.items() if field.types and field.types[0].name == "STRING"
        }
        tensors: dict[str, Decoded] = {}
        for tensor in reader.tensors:
            if not is_name(tensor.name):
                raise CheckpointError("not the name of a tensor", where=str(path), got=brief(tensor.name))
            shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
            kept = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
            if kept is not None:
                shape = _shape(kept, shape, f"{path}: {tensor.name}")
            tensors[tensor.name] = tensor_of(
                tensor.data, tensor.tensor_type, shape, path, tensor.name, int(tensor.n_bytes)
            )
    except OSError as error:
        raise CheckpointError("the file cannot be read", where=str(path), got=error.strerror) from None
    except DAMAGED as error:
        raise CheckpointError(
            "not a GGUF file, or a damaged one",
            where=str(path),
            got=brief(error).rstrip("."),
            hint="Download or convert it again.",
        ) from None
    return tensors, texts


def tensor_of(data: Any, kind: Any, shape: tuple[int, ...], file: Path, name: str, nbytes: int) -> Decoded:
    """A tensor of a GGUF file, as what it decodes to.

    Args:
        data: what the package's reader gives, (..., bytes of a row) for the types that it decodes.
        kind: a `gguf.GGMLQuantizationType`.
        shape: of the tensor that it means.

    Raises CheckpointError for a type that the package does not decode.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    where = f"{file.name}: {name}"
    if kind.name not in EXACT:
        try:  # one block of zeros, to know before anything is written
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                "a GGUF type that the gguf package does not decode",
                where=where,
                got=kind.name,
                hint="Take a file of another type, or a newer gguf package.",
            ) from None
    info = TensorInfo(shape, EXACT.get(kind.name, torch.float32))
    read = partial(_values, data, kind, info, where)
    return Decoded(file, name, nbytes, info, read, f"GGUF {kind.name}", exact=kind.name in EXACT)


def _values(data: Any, kind: Any, info: TensorInfo, where: str) -> Tensor:
    from gguf.quants import dequantize

    assert info.dtype is not None
    with np.errstate(all="ignore"):  # what is not finite is said below
        made = dequantize(data, kind)
    if not made.flags.writeable:  # mapped: torch warns of memory that cannot be written
        made = made.copy()
    out = torch.from_numpy(made).view(info.shape).to(info.dtype)
    if out.numel() and not all(map(torch.isfinite, torch.aminmax(out))):
        raise CheckpointError("codes that mean infs or NaNs", where=where, hint="The file is damaged: fetch it again.")
    return out


def _text(field: Any) -> str:
    return str(bytes(field.parts[field.data[-1]]), "utf-8", "replace")


def _shape(field: Any, stored: tuple[int, ...], where: str) -> tuple[int, ...]:
    """The shape that a tensor had before it was reshaped to be written."""
    shape = tuple(int(field.parts[index][0]) for index in field.data)
    if any(n < 1 for n in shape) or np.prod(shape, dtype=object) != np.prod(stored, dtype=object):
        raise CheckpointError(
            "a tensor's original shape holds another number of values", where=where, got=shape, expected=stored
        )
    return shape
