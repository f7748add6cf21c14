"""`CheckpointPlan`: everything that a run will write, known and checked before the first byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxdit.checkpoint.component import counted
from mxdit.checkpoint.layout import CONFIG
from mxdit.checkpoint.writer import STEM, Progress, Shard, index_of, new_directory
from mxdit.errors import CheckpointError
from mxdit.version import __version__

SHARD = 2 << 30  # most bytes of a file, unless told otherwise


@dataclass(frozen=True)
class ComponentPlan:
    """What one component's folder will hold.

    component   its name in the pipeline, "" where the directory is the component.
    config      its config.json.
    shards      its weight files.
    json_files  its other JSON files.
    methods     linear -> method, None where it is float.
    reads       the files that its tensors come from.
    stem        of the names of its weight files.
    """

    component: str
    config: Mapping[str, Any]
    shards: list[Shard]
    json_files: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, str | None]
    reads: tuple[Path, ...]
    stem: str = STEM

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def inside(self, name: str) -> str:
        """The path of one of its files in the destination."""
        return f"{self.component}/{name}" if self.component else name


@dataclass(frozen=True)
class CheckpointPlan:
    """A whole directory.

    carried     file in the destination -> the file it is taken from.
    json_files  file in the destination -> its object, beside those of the components.
    lost        what the destination's format cannot say.
    device      where weights are quantized.
    """

    source: Path
    destination: Path
    components: list[ComponentPlan]
    carried: Mapping[str, Path]
    json_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(component.nbytes for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable: every file, and every tensor with its dtype and shape."""
        return {
            "source": str(self.source),
            "destination": str(self.destination),
            "bytes": self.nbytes,
            "lost": list(self.lost),
            "carried": {name: str(path) for name, path in self.carried.items()},
            "experts": [
                {
                    "component": component.component,
                    "bytes": component.nbytes,
                    "config": dict(component.config),
                    "linears": counted(component.methods),
                    "files": {
                        shard.name: {name: str(part.info) for name, part in shard.parts.items()}
                        for shard in component.shards
                    },
                }
                for component in self.components
            ],
        }

    def write(self, progress: Progress = lambda done, total: None, *, copy: bool = False) -> None:
        """Write it. An interrupted run of the same plan goes on where it was; see `writer.new_directory`."""
        total, done = self.nbytes, 0

        def wrote(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        with new_directory(self.destination, self._fingerprint()) as staging:
            shards = {part.inside(shard.name): shard for part in self.components for shard in part.shards}
            missing = {name for name, shard in shards.items() if not staging.has(name, shard)}
            copies = [path for path in self.carried.values() if copy or not staging.links(path)]
            staging.require_room(
                sum(shards[name].nbytes for name in missing) + sum(path.stat().st_size for path in copies)
            )
            for name, shard in shards.items():
                if name in missing:
                    staging.write_shard(name, shard, wrote)
                else:
                    wrote(shard.nbytes)
            for component in self.components:
                if len(component.shards) > 1:
                    staging.write_json(
                        component.inside(f"{component.stem}.safetensors.index.json"), index_of(component.shards)
                    )
                for name, value in component.json_files.items():
                    staging.write_json(component.inside(name), value)
            for name, path in self.carried.items():
                staging.carry(path, name, copy=copy)
            for component in self.components:
                staging.write_json(component.inside(CONFIG), component.config)
            for name, value in self.json_files.items():
                staging.write_json(name, value)

    def _fingerprint(self) -> str:
        """Everything the written bytes depend on: this plan, the code's version, and the files it reads."""
        read = sorted({path for part in self.components for path in part.reads} | set(self.carried.values()))
        try:
            stats = [(str(path), s.st_size, s.st_mtime_ns) for path in read for s in (path.stat(),)]
        except OSError as error:
            raise CheckpointError("the file cannot be read", where=str(error.filename), got=error.strerror) from None
        return json.dumps([self.to_dict(), self.device, __version__, stats], sort_keys=True, default=str)
