"""Whole checkpoints: quantize a float one, convert between layouts. Everything is planned before the first byte is written.

`quantize_checkpoint` and `convert_checkpoint` are what `mxdit quantize` and `mxdit convert` run. Tensors are mapped, made and
written one at a time, so memory holds one layer whatever the model's size.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxdit.checkpoint.canonical import FLOATS, read_expert
from mxdit.checkpoint.experts import Expert
from mxdit.checkpoint.files import read_json
from mxdit.checkpoint.layouts.sglang import to_sglang
from mxdit.checkpoint.layouts.vllm_omni import to_vllm_omni
from mxdit.checkpoint.sources import CONFIG, INDEX, Source, open_both, open_source
from mxdit.checkpoint.writer import STEM, Part, Progress, Shard, check_destination, index_of, new_directory, shards_of
from mxdit.config import ConfigLike, MXConfig
from mxdit.errors import CheckpointError, ConfigError, InputError
from mxdit.models import SPECS
from mxdit.models.skeleton import skeleton_of
from mxdit.numerics.formats import TensorInfo, block_format
from mxdit.quantize.apply import quantized
from mxdit.quantize.plan import Decision, plan
from mxdit.version import __version__

SHARD = 2 << 30
TARGETS = ("packed", "vllm-omni", "sglang")


@dataclass(frozen=True)
class ExpertPlan:
    """What one expert's folder will hold."""

    component: str
    config: Mapping[str, Any]
    shards: list[Shard]
    json_files: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, str | None]
    reads: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def inside(self, name: str) -> str:
        """The path of one of its files in the destination."""
        return f"{self.component}/{name}" if self.component else name


@dataclass(frozen=True)
class CheckpointPlan:
    """Everything that a run will write, known before it writes.

    carried  file in the destination -> the file it is taken from.
    json_files  file in the destination -> its object, beside those of the experts.
    lost     what the destination's format cannot say.
    """

    source: Path
    destination: Path
    experts: list[ExpertPlan]
    carried: Mapping[str, Path]
    json_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(expert.nbytes for expert in self.experts)

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
                    "component": expert.component,
                    "bytes": expert.nbytes,
                    "config": dict(expert.config),
                    "linears": _counts(expert.methods),
                    "files": {
                        shard.name: {name: str(part.info) for name, part in shard.parts.items()}
                        for shard in expert.shards
                    },
                }
                for expert in self.experts
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
            shards = {expert.inside(shard.name): shard for expert in self.experts for shard in expert.shards}
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
            for expert in self.experts:
                if len(expert.shards) > 1:
                    staging.write_json(expert.inside(f"{STEM}.safetensors.index.json"), index_of(expert.shards))
                for name, value in expert.json_files.items():
                    staging.write_json(expert.inside(name), value)
            for name, path in self.carried.items():
                staging.carry(path, name, copy=copy)
            for expert in self.experts:
                staging.write_json(expert.inside(CONFIG), expert.config)
            for name, value in self.json_files.items():
                staging.write_json(name, value)

    def _fingerprint(self) -> str:
        """Everything the written bytes depend on: this plan, the code's version, and the files it reads."""
        read = sorted({path for expert in self.experts for path in expert.reads} | set(self.carried.values()))
        try:
            stats = [(str(path), s.st_size, s.st_mtime_ns) for path in read for s in (path.stat(),)]
        except OSError as error:
            raise CheckpointError("the file cannot be read", where=str(error.filename), got=error.strerror) from None
        return json.dumps([self.to_dict(), __version__, stats], sort_keys=True, default=str)


def quantize_checkpoint(
    source: Path,
    destination: Path,
    config: ConfigLike,
    overrides: Mapping[str, ConfigLike | None] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: int = SHARD,
) -> CheckpointPlan:
    """Plan the packed checkpoint of a float one; `.write()` carries it out.

    Args:
        source: a BF16, FP16 or FP32 checkpoint in diffusers or the original layout: a pipeline, a cascade, or one expert.
        destination: a directory that does not exist.
        config: how every expert is quantized.
        overrides: component -> its own config, or None to keep that expert in `dtype`.
        dtype: of what is not quantized; weights are cast to it before they are quantized, as an online load does.
        shard_size: most bytes of a file.

    Raises InputError, ConfigError and CheckpointError for what cannot be done, before anything is written.
    """
    if dtype not in FLOATS:
        raise InputError("no dtype of a model", where="dtype", got=dtype, expected=" or ".join(map(str, FLOATS)))
    check_destination(destination)
    opened = open_source(source)
    own = dict(overrides or {})
    unknown = [name for name in own if name not in opened.experts]
    if unknown:
        raise ConfigError(
            "a config for an expert that the checkpoint does not have",
            where=str(source),
            got=unknown[0],
            expected=" or ".join(opened.experts) or "none, the checkpoint is one expert",
        )
    if own and all(own.get(name, config) is None for name in opened.experts):
        raise ConfigError("every expert is left unquantized", where=str(source))
    experts = []
    for name in opened.experts:
        expert = read_expert(opened.read(name))
        if expert.quantization is not None or any(expert.methods.values()):
            raise CheckpointError(
                "the checkpoint is quantized already",
                where=str(opened.experts[name]),
                got=expert.stored.layout,
                expected="a BF16, FP16 or FP32 checkpoint",
                hint="mxdit convert changes its layout.",
            )
        expert.require_sound()
        chosen = own.get(name, config)
        experts.append(
            _quantize_expert(name, expert, None if chosen is None else MXConfig.of(chosen), dtype, shard_size)
        )
    carried, files = _rest(opened)
    return CheckpointPlan(source, destination, experts, carried, files)


def convert_checkpoint(
    source: Path,
    destination: Path,
    to: str,
    *,
    base: Path | None = None,
    fallback_from_base: bool = False,
    allow_loss: bool = False,
    shard_size: int = SHARD,
) -> CheckpointPlan:
    """Plan a quantized checkpoint in another layout; `.write()` carries it out.

    Args:
        source: a quantized checkpoint in any layout: msModelSlim's (packed or numeric, wrapped or not), vLLM-Omni's,
            SGLang's, or ours.
        destination: a directory that does not exist.
        to: "packed", "vllm-omni" or "sglang".
        base: the unquantized model, for what `source` lacks: config.json, text encoder, VAE, and layers.
        fallback_from_base: take layers of another method than the rest, and smoothed float ones, from `base`.
        allow_loss: go on where the destination's format cannot say everything.
        shard_size: most bytes of a file.

    Raises InputError, ConfigError and CheckpointError for what cannot be done, before anything is written.
    """
    if to not in TARGETS:
        raise InputError("no such layout", field="to", got=repr(to), expected=", ".join(TARGETS))
    if fallback_from_base and base is None:
        raise InputError("no base is named to keep layers from", field="fallback_from_base")
    check_destination(destination)
    opened, opened_base = open_both(source, base)
    if opened_base is not None and set(opened_base.experts) != set(opened.experts):
        raise CheckpointError(
            "the base has other experts",
            where=str(base),
            got=", ".join(opened_base.experts) or "one expert",
            expected=", ".join(opened.experts) or "one expert",
        )
    experts, lost = [], []
    for name in opened.experts:
        under = opened_base.read(name) if opened_base is not None else None
        expert = read_expert(opened.read(name), under, fallback=fallback_from_base)
        expert.require_sound()
        unknown = None if to == "packed" else expert.unknown_to(to)
        if unknown:
            raise InputError(
                unknown,
                where=f"convert --to {to}",
                expected=" or ".join(spec.transformer for spec in SPECS.values() if to in spec.runtimes),
                hint="Use the packed layout, or give its names in the family's ModelSpec (docs/adapting-a-model.md).",
            )
        made, gone = _convert_expert(name, expert, to, shard_size)
        experts.append(made)
        lost += [f"{name or 'expert'}: {item}" for item in (*expert.lost, *gone)]
    if not any(any(expert.methods.values()) for expert in experts):
        raise CheckpointError("the checkpoint is not quantized", where=str(source), hint="mxdit quantize does that.")
    if lost and not allow_loss:
        raise InputError(
            f"{len(lost)} thing{'s' * (len(lost) > 1)} would be lost",
            where=f"convert --to {to}",
            got="; ".join(lost),
            hint="Add --allow-loss to go on without them.",
        )
    carried, files = _rest(opened if opened.pipeline or opened_base is None else opened_base)
    return CheckpointPlan(source, destination, experts, carried, files, tuple(lost))


# -- one expert --------------------------------------------------------------------------------------------------------


def _quantize_expert(
    name: str, expert: Expert, config: MXConfig | None, dtype: torch.dtype, shard_size: int
) -> ExpertPlan:
    parts: dict[str, Part] = {}
    written = {key: value for key, value in expert.config.items() if key != "quantization_config"}
    methods: dict[str, str | None] = dict.fromkeys(expert.methods)
    if config is not None:
        if config.is_checkpoint_serialized:
            raise ConfigError("the config is one of a serialized checkpoint", where=name or "quantize")
        skeleton = skeleton_of(expert.config, str(expert.stored.folder))
        decisions = plan(skeleton, config)
        methods = {path: str(config.quant_method) if d.scheme else None for path, d in decisions.items()}
        kept = [path for path, decision in decisions.items() if not decision.scheme]
        written["quantization_config"] = config.serialized(kept, {"mxdit": __version__}).to_dict()
    for tensor, part in expert.parts.items():
        path, _, leaf = tensor.rpartition(".")
        if config is not None and methods.get(path) and leaf == "weight":
            parts.update(_quantized_parts(path, part, config, dtype))
        else:
            parts[tensor] = Part(TensorInfo(part.info.shape, dtype), partial(_cast, part, dtype, tensor))
    return ExpertPlan(name, written, shards_of(parts, shard_size), {}, methods, _reads(expert))


def _quantized_parts(path: str, weight: Part, config: MXConfig, dtype: torch.dtype) -> dict[str, Part]:
    """The parts of a quantized linear. Its weight is encoded once, when the first of them is read."""
    row = block_format(config.quant_method)
    n, k = weight.info.shape
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((n, k // row.per_byte), torch.uint8),
        "weight_scale": ((n, row.blocks(k)), torch.uint8),
    }
    if row.outer:
        shapes["weight_dual_scale"] = ((n, row.groups(k), 1), torch.float32)
    waiting: dict[str, Tensor] = {}

    def read(leaf: str) -> Tensor:
        if leaf not in waiting:
            layer = quantized(weight.read().to(dtype), None, config, Decision(), path)
            waiting.update({name: getattr(layer, name) for name in shapes})
        return waiting.pop(leaf)

    return {
        f"{path}.{leaf}": Part(TensorInfo(shape, kind), partial(read, leaf)) for leaf, (shape, kind) in shapes.items()
    }


def _convert_expert(name: str, expert: Expert, to: str, shard_size: int) -> tuple[ExpertPlan, list[str]]:
    written = {key: value for key, value in expert.config.items() if key != "quantization_config"}
    parts, files, lost = dict(expert.parts), {}, []
    if expert.quantization is None:
        pass  # an expert of a cascade that was left float is float in every layout
    elif to == "packed":
        written["quantization_config"] = replace(expert.quantization, producer={"mxdit": __version__}).to_dict()
    elif to == "vllm-omni":
        parts, written["quantization_config"], lost = to_vllm_omni(expert)
    else:
        parts, files["quant_model_description.json"], lost = to_sglang(expert)
    return ExpertPlan(name, written, shards_of(parts, shard_size), files, expert.methods, _reads(expert)), lost


def _reads(expert: Expert) -> tuple[Path, ...]:
    """The files that its tensors come from."""
    stored = [expert.stored, *([expert.base] if expert.base else [])]
    return tuple(sorted({tensor.file for source in stored for tensor in source.tensors.values()}))


def _rest(source: Source) -> tuple[dict[str, Path], dict[str, Mapping[str, Any]]]:
    """What a pipeline holds beside its experts: files to take over, and model_index.json, which comes last."""
    if not source.pipeline:
        return {}, {}
    carried: dict[str, Path] = {}
    seen = {source.path.resolve()}  # a folder may be a link, as a hub's cache has them, and a link may lead in circles
    for folder, folders, files in os.walk(source.path, onerror=_unreadable, followlinks=True):
        inside = Path(folder).relative_to(source.path)
        inner = {name: (Path(folder) / name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [n for n, real in inner.items() if real not in seen and str(inside / n) not in source.experts]
        seen.update(inner[name] for name in folders)
        for file in sorted(files):
            path = Path(folder) / file
            if file.startswith(".") or str(inside / file) == INDEX:
                continue
            if not path.is_file():
                raise CheckpointError("not a file, or a link to none", where=str(path), hint="Fetch the model again.")
            carried[str(inside / file)] = path
    return carried, {INDEX: read_json(source.path / INDEX)}


def _unreadable(error: OSError) -> None:
    raise CheckpointError("the folder cannot be read", where=str(error.filename), got=error.strerror) from None


def _counts(methods: Mapping[str, str | None]) -> dict[str, int]:
    """Number of linears by method."""
    return dict(Counter(method or "float" for method in methods.values()))


def _cast(part: Part, dtype: torch.dtype, name: str) -> Tensor:
    tensor = part.read().to(dtype)
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise CheckpointError(
            "the tensor holds infs or NaNs",
            where=name,
            expected=f"numbers that {str(dtype).removeprefix('torch.')} has",
            hint="The checkpoint is damaged, or overflows in this dtype: take it in BF16 or FP32.",
        )
    return tensor
