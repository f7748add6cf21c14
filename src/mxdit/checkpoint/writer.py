"""Writing a checkpoint's directory so that nothing is lost: planned whole, streamed, and visible only when it is complete.

Everything goes into a hidden directory beside the destination, which is renamed at the end. A shard gets its name when its
bytes are on disk, so a run that was killed goes on after the last whole shard; config.json comes last. Files are the same
byte for byte whichever way they were arrived at.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxdit.checkpoint.files import CODES, read_header
from mxdit.errors import CheckpointError, InputError, MXDiTError
from mxdit.numerics.formats import TensorInfo

STEM = "diffusion_pytorch_model"
ENCODER_STEM = "model"  # in transformers' folders
PLAN = "plan.sha256"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class Part:
    """A tensor to be written: its shape and dtype beforehand, its data when its turn comes."""

    info: TensorInfo
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Shard:
    """One file: the tensors it holds, in the order in which they are made."""

    name: str
    parts: Mapping[str, Part]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, header not counted."""
        return sum(part.info.nbytes for part in self.parts.values())

    def head(self) -> tuple[bytes, dict[str, int]]:
        """The file's head and, per tensor, where its data begins. Wide dtypes lie first, so that each is aligned."""
        order = sorted(self.parts, key=lambda name: (-_dtype(self.parts[name]).itemsize, name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in order:
            info = self.parts[name].info
            offsets[name], end = end, end + info.nbytes
            entries[name] = {
                "dtype": CODES[_dtype(self.parts[name])],
                "shape": list(info.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + offset for name, offset in offsets.items()}


def shards_of(parts: Mapping[str, Part], limit: int, stem: str = STEM) -> list[Shard]:
    """Files of at most `limit` bytes each, in the order of `parts`; the tensors of one module stay together.

    Raises InputError where the tensors of one module exceed the limit.
    """
    modules: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = part
    groups: list[dict[str, Part]] = [{}]
    size = 0
    for path, members in modules.items():
        nbytes = sum(part.info.nbytes for part in members.values())
        if nbytes > limit:
            raise InputError(
                "a shard cannot hold one module",
                field="shard_size",
                got=f"{limit} bytes, and {path} has {nbytes}",
                hint="Allow larger shards.",
            )
        if size + nbytes > limit and groups[-1]:
            groups.append({})
            size = 0
        groups[-1].update(members)
        size += nbytes
    if len(groups) == 1:
        return [Shard(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [Shard(f"{stem}-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


@contextmanager
def new_directory(destination: Path, plan: str) -> Iterator[Staging]:
    """A directory that becomes `destination` when the block ends, and not before.

    Args:
        destination: must not exist.
        plan: text that says everything the result depends on. What an interrupted run with the same plan left is kept,
            what another left is removed.

    An error of mxdit's own inside the block removes everything: its cause lies in what is read, so no later run has this plan.

    Raises:
        InputError: the destination exists or cannot be made, or another process is writing it.
        CheckpointError: the disk is full or cannot be written; finished shards stay for the next run.
    """
    partial = destination.parent / f".{destination.name}.partial"
    check_destination(destination)
    with _lock(partial, destination), _explained(partial, destination):
        mark = partial / PLAN
        digest = hashlib.sha256(plan.encode()).hexdigest()
        if not mark.is_file() or mark.read_text() != digest:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_synced(mark, digest.encode())
        try:
            yield Staging(partial)
        except MXDiTError:
            shutil.rmtree(partial)
            raise
        check_destination(destination)
        for folder, _, _ in os.walk(partial):
            sync(Path(folder))
        mark.unlink()
        os.rename(partial, destination)
        sync(destination.parent)


@contextmanager
def _lock(partial: Path, destination: Path) -> Iterator[None]:
    """Make the hidden directory, and keep other processes out of it."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError("the destination cannot be made", where=str(destination), got=error.strerror) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have finished and renamed it since it was opened.
            held = os.path.samestat(os.fstat(lock), os.stat(partial))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError("another process is writing this", where=str(destination))
        check_destination(destination)
        yield
    finally:
        os.close(lock)


@contextmanager
def _explained(partial: Path, destination: Path) -> Iterator[None]:
    """Make one clear error of what the file system says, and remove what no later run could use."""
    try:
        yield
    except OSError as error:
        hint = "Make room" if error.errno in FULL else "Mend that"
        if any(partial.rglob("*.safetensors")):
            hint += f" and run the same command again: it goes on from {partial}. Or remove that directory."
        else:
            shutil.rmtree(partial, ignore_errors=True)
            hint += " and run the same command again."
        raise CheckpointError(
            "the disk is full" if error.errno in FULL else "the checkpoint cannot be written",
            where=str(destination),
            got=error.strerror if error.filename is None else f"{error.strerror}: {error.filename}",
            hint=hint,
        ) from error


def check_destination(destination: Path) -> None:
    """Raise InputError for a destination that exists, or that nothing can be written to."""
    if os.path.lexists(destination):
        raise InputError(
            "the destination exists", where=str(destination), hint="Name a new directory: nothing is overwritten."
        )
    above = next(parent for parent in destination.absolute().parents if os.path.lexists(parent))
    refused = errno.ENOTDIR if not above.is_dir() else 0 if os.access(above, os.W_OK | os.X_OK) else errno.EACCES
    if refused:
        raise InputError(
            "the destination cannot be made", where=str(destination), got=f"{os.strerror(refused)}: {above}"
        )


class Staging:
    """The directory while it is being written. Names are paths inside it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, name: str, shard: Shard) -> bool:
        """Whether an earlier run finished this shard."""
        path = self.root / name
        if not path.is_file():
            return False
        try:
            stored = read_header(path)
        except CheckpointError:
            return False
        return {n: t.info for n, t in stored.items()} == {n: p.info for n, p in shard.parts.items()}

    def links(self, source: Path) -> bool:
        """Whether a file can be taken over without room of its own."""
        return source.stat().st_dev == self.root.stat().st_dev

    def require_room(self, nbytes: int) -> None:
        """Raise an OSError, as a write would, where the disk has no room for that many bytes more."""
        free = shutil.disk_usage(self.root).free
        if nbytes > free:
            raise OSError(errno.ENOSPC, f"{nbytes} bytes are to be written and {free} are free")

    def write_shard(self, name: str, shard: Shard, wrote: Callable[[int], None] = lambda nbytes: None) -> None:
        """Stream one shard, one tensor at a time, and tell `wrote` the bytes of each."""
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.tmp")
        head, offsets = shard.head()
        try:
            with temporary.open("wb") as file:
                file.write(head)
                for tensor, part in shard.parts.items():
                    data = part.read()
                    if TensorInfo.of(data) != part.info:
                        raise CheckpointError(
                            "a tensor differs from its plan", where=tensor, got=TensorInfo.of(data), expected=part.info
                        )
                    file.seek(offsets[tensor])
                    file.write(data.contiguous().view(-1).view(torch.uint8).numpy().data)
                    del data
                    wrote(part.info.nbytes)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # half a shard is of no use, and its room is needed
            raise
        os.rename(temporary, path)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON object."""
        write_synced(self._path(name), (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def carry(self, source: Path, name: str, *, copy: bool) -> None:
        """Take over a file: as a hard link, or as a copy where `copy` says so or the file system cannot link."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        real = source.resolve()
        if not copy:
            try:
                os.link(real, path)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                copy = True
        if copy:
            shutil.copyfile(real, path)
            sync(path)

    def _path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The index.json of several shards, as diffusers reads it."""
    return {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in sorted(shard.parts)},
    }


def _dtype(part: Part) -> torch.dtype:
    assert part.info.dtype is not None
    return part.info.dtype


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
