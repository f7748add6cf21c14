"""Safetensors files, read strictly and lazily.

A header is believed only after every number in it has been checked against the file, in Python's integers, so that a
damaged or hostile file is one clear error: never a traceback, a hang, or an allocation beyond the file's own size. Data
stays on disk until `StoredTensor.read` maps it.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data without holes).
"""

from __future__ import annotations

import json
import mmap
import os
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mxdit.errors import CheckpointError
from mxdit.numerics.formats import TensorInfo

# Bits of an element of every dtype that safetensors 0.8 knows, and the torch dtype where a checkpoint of ours may hold it.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Bytes of a header or a JSON file: 30000 tensors' worth. Parsing takes some 25 times as much memory, which is bounded so.
MAX_JSON = 1 << 22
MAX_NAME = 512  # characters; the names of one model's tensors are well below 100
_REPR = reprlib.Repr()
_REPR.maxstring = 120


class Readable(Protocol):
    """A tensor that is read when it is asked for: as a file holds it (`StoredTensor`), or made of what a file holds."""

    @property
    def file(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        ...

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype of what `read` gives."""
        ...

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what the header says of it, and where its bytes lie."""

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(self.shape, DTYPES.get(self.code))

    def read(self) -> Tensor:
        """The tensor, mapped: its pages belong to the file and are read when touched. Raises CheckpointError."""
        dtype = DTYPES.get(self.code)
        if dtype is None:
            raise CheckpointError("a dtype that no layer takes", where=f"{self.file}: {self.name}", got=self.code)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        try:
            with self.file.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self.start + self.nbytes:
                    raise CheckpointError(
                        "the file was cut while it was read", where=str(self.file), got=f"{size} bytes"
                    )
                page = self.start % mmap.ALLOCATIONGRANULARITY
                # A private, writable view: nothing writes to it, but torch warns of memory that cannot be written.
                view = mmap.mmap(file.fileno(), self.nbytes + page, access=mmap.ACCESS_COPY, offset=self.start - page)
        except OSError as error:
            raise _unreadable(self.file, error) from error
        data = torch.frombuffer(view, dtype=torch.uint8, count=self.nbytes, offset=page)
        if self.start % dtype.itemsize:
            data = data.clone()  # aligned
        return data.view(dtype).view(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name. Raises CheckpointError for anything the format does not allow."""
    return read_safetensors(path)[0]


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file by name, and its metadata. Raises CheckpointError as `read_header` does."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a file", where=str(path))
        size = status.st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, MAX_JSON):
                raise CheckpointError(
                    "not a safetensors file, or a truncated one",
                    where=str(path),
                    got=f"{size} bytes, of which the header would be {length}" if len(head) == 8 else f"{size} bytes",
                    hint="Download or convert it again.",
                )
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_natural,
            parse_constant=_natural,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the header is no valid JSON", where=str(path), got=brief(error)) from None
    if not isinstance(header, dict):
        raise CheckpointError("the header is no JSON object", where=str(path), got=type(header).__name__)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(map(_is_text, [*metadata, *metadata.values()]))
    ):
        raise CheckpointError("the header's __metadata__ is not text", where=str(path), got=brief(metadata))
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise CheckpointError(
                "tensors overlap or leave a gap",
                where=f"{path}: {tensor.name}",
                got=f"data from byte {tensor.start}",
                expected=f"from byte {end}",
                hint="Download or convert it again.",
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            "the file is truncated" if end > size else "the file holds bytes that belong to no tensor",
            where=str(path),
            got=f"{size} bytes",
            expected=f"{end} by its header",
            hint="Download or convert it again.",
        )
    return tensors, metadata or {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is missing, unreadable or holds anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON:
            got = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no file"
            raise CheckpointError("not a JSON file of a checkpoint", where=str(path), got=got)
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(
            "a file is missing", where=str(path), hint="Download or convert the model again."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("the file cannot be read", where=str(path), got=brief(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file holds no JSON object", where=str(path), got=type(value).__name__)
    return value


def _tensor(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    if not is_name(name):
        raise CheckpointError("not the name of a tensor", where=str(path), got=brief(name))
    where = f"{path}: {name}"
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("not the entry of a tensor", where=where, got=brief(entry))
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise CheckpointError("unknown dtype", where=where, got=brief(code))
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError("impossible shape or offsets", where=where, got=f"{brief(shape)} at {brief(offsets)}")
    bits, nbytes = prod(shape) * BITS[code], offsets[1] - offsets[0]
    if prod(max(n, 1) for n in shape) * BITS[code] >= 1 << 63:  # torch counts in 64 bits, also where there is no data
        raise CheckpointError("a shape that no tensor can have", where=where, got=brief(shape))
    if bits != 8 * nbytes:
        raise CheckpointError(
            "shape and data disagree",
            where=where,
            got=f"{nbytes} bytes",
            expected=f"{bits / 8:g} for {brief(shape)} {code}",
        )
    return StoredTensor(path, name, code, tuple(shape), data + offsets[0], nbytes)


def _counts(value: object) -> bool:
    """Whether this is a list of at most 64 (torch's most axes) integers from 0 to 2^63 - 1."""
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key!r:.80} occurs twice")
        found[key] = value
    return found


def _natural(text: str) -> int:
    """The only numbers that a header may hold. ValueError for another, -0 included."""
    if not text.isdigit():
        raise ValueError(f"{text:.40} is no natural number")
    return int(text)


def is_name(name: str) -> bool:
    """Whether messages can show it. What no model calls a tensor (control characters, half characters) is refused."""
    return name.isprintable() and len(name) <= MAX_NAME


def _is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can say: JSON's escapes allow half a surrogate pair."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode("utf-8")


def brief(value: object) -> str:
    # reprlib looks at the first items only, and not deep: what a file says may be long or nested without end.
    text = str(value) if isinstance(value, BaseException) else _REPR.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError("the file cannot be read", where=str(path), got=error.strerror or str(error))
