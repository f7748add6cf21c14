"""What an evaluation has computed, on disk, found by what it was computed from.

An entry is a directory named by the hash of its key, a JSON object of everything that its content depends on. It appears
whole or not at all, so an interrupted run goes on at the sample where it stopped, and nothing is reused that a change of
model, setting, version or backend would change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.checkpoint.files import read_json
from mxdit.errors import InputError
from mxdit.layers import MXLinear
from mxdit.quantize.recorded import recorded_config

KEY = "key.json"  # in every entry: its key, for people, and the seconds that it took
NOTES = ("is_local", "local_files_only")  # what transformers adds to the config of a tokenizer that it saves
CHUNK = 64 << 20  # bytes of a tensor that are hashed at a time, and at most copied from a device


class Cache:
    """Entries below one directory. Raises InputError where it cannot be written.

    Attributes:
        root: the directory, made if need be.
        seconds: what the entries used so far took to make, whether now or in an earlier run.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.seconds = root, 0.0
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK):
                raise PermissionError(0, "not writable")
        except OSError as error:
            raise InputError("the cache cannot be written", where=str(root), got=error.strerror) from None

    def entry(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The entry of `key`, made if there is none.

        Args:
            key: JSON-serializable, with all that the content depends on.
            make: called with an empty directory to write the files into.
        """
        final = self.root / digest_of(key)
        if not final.exists():
            partial = final.with_name(f".{final.name}.{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                started = time.perf_counter()
                make(partial)
                seconds = time.perf_counter() - started
                (partial / KEY).write_text(json.dumps({"key": key, "seconds": seconds}, indent=1))
                if not final.exists():  # another process may have been quicker
                    os.replace(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        self.seconds += json.loads((final / KEY).read_text())["seconds"]
        return final

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether `entry` would find it made."""
        return (self.root / digest_of(key)).exists()

    def figures(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The JSON value of `key`, computed by `make` if it is not there."""

        def write(directory: Path) -> None:
            (directory / "figures.json").write_text(json.dumps(make()))

        return json.loads((self.entry(key, write) / "figures.json").read_text())


def digest_of(key: Mapping[str, Any]) -> str:
    """A short hash of a JSON-serializable object."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@cache
def digest_of_code() -> str:
    """Hash of mxdit itself, its sources and its native library: the version alone stays, while either is worked on."""
    found = hashlib.sha256()
    for part in (path for path in Path(str(files("mxdit"))).rglob("*.py")):
        found.update(part.read_bytes())
    library = Path(str(files("mxdit.backends").joinpath("libmxdit_cpu.so")))  # elsewhere in an editable install
    found.update(library.read_bytes() if library.is_file() else b"none")
    return found.hexdigest()[:16]


def place_of(where: Mapping[str, Any]) -> list[Any]:
    """What the bits of a run depend on beside versions: the device, who answers there, and on a CPU how many threads there are,
    because torch adds up in other orders with more of them.

    Args:
        where: from `mxdit.backends.environment.environment`.
    """
    threads = where["threads"] if torch.device(where["device"]).type == "cpu" else None
    return [where["device"], where["device_name"], where["backend"], where["about"], threads]


def digest_of_experts(experts: Mapping[str, nn.Module]) -> str:
    """Hash of the configs, the weights and what each quantized linear computes: equal for a model quantized now or loaded so."""
    found = hashlib.sha256()
    for name, model in experts.items():
        config = {key: value for key, value in _config(model).items() if key != "quantization_config"}
        found.update(digest_of(_own(config)).encode())
        recorded = recorded_config(model)
        if recorded is not None and recorded.activation_steps:
            found.update(f"{name} {recorded.activation_steps}\n".encode())
        for path, module in model.named_modules():
            if isinstance(module, MXLinear):
                found.update(f"{name} {path} {module.method} {module.scheme} {module.rule}\n".encode())
        for path, tensor in model.state_dict().items():
            found.update(f"{name} {path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            _add(found, tensor)
    return found.hexdigest()


def _config(model: nn.Module) -> dict[str, Any]:
    """A model's config as JSON: of diffusers a mapping, of transformers an object that says so itself."""
    config: Any = getattr(model, "config", {})
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def digest_of_files(root: Path, besides: Collection[str]) -> str:
    """Hash of the names and contents of all files in the folders of `root`, but for some of these.

    Of configs what a copy notes about where it came from is left out.
    """
    found = hashlib.sha256()
    folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name not in besides]
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(root).as_posix()}\n".encode())
        if path.name.endswith("config.json"):
            found.update(digest_of(_own(read_json(path))).encode())
        else:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def stats_of(paths: Collection[Path]) -> list[tuple[str, int, int]]:
    """(path, bytes, time of the last change) of files, and of all below directories: enough to see that one was replaced."""
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else (path,))]
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in found if f.is_file()]


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what a copy notes about where it came from."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in NOTES}


def _add(found: Any, tensor: Tensor) -> None:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for chunk in raw.split(CHUNK):
        found.update(chunk.cpu().numpy())
