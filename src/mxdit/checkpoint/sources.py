"""A checkpoint's directory: which components it has, in which layout each is, and what lies beside them.

`open_source` tells by what is there, never by a guess; docs/checkpoints.md has the table.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mxdit.checkpoint.coded import PREFIXES, unprefixed
from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.files import Readable, read_json, read_safetensors
from mxdit.checkpoint.folders import (
    choose_variant,
    is_index,
    open_tensors,
    plain_name,
    read_index,
    taken,
    unreadable,
)
from mxdit.checkpoint.gguf import read_gguf
from mxdit.checkpoint.layout import CONFIG, Folder
from mxdit.checkpoint.layouts import LAYOUTS
from mxdit.checkpoint.layouts.description import DESCRIPTION, WEIGHTS, described
from mxdit.config.encoders import is_stated
from mxdit.errors import CheckpointError, InputError
from mxdit.models import COMPONENTS, SPECS, TEXT_ENCODERS, ModelSpec
from mxdit.models.encoders import PLAIN

INDEX = "model_index.json"
MODULAR = "modular_model_index.json"  # of a pipeline made of blocks, which may have parts of other repositories
SUFFIXES = tuple(layout.suffix for layout in LAYOUTS.values() if layout.suffix)


@dataclass(frozen=True)
class Source:
    """A directory of a checkpoint, or the single files of its components.

    components  name -> folder or file; the name is "" for a directory or a file that is one component itself.
    pipeline    whether the directory is a diffusers pipeline, with text encoder and the rest.
    encoders    name -> folder of its text encoders whose files mxdit reads.
    variant     of the weight files, where a folder has it; None for plain ones.
    described   component -> folder whose config.json describes a component that is a file.
    """

    path: Path
    spec: ModelSpec
    components: Mapping[str, Path]
    pipeline: bool
    variant: str | None = None
    encoders: Mapping[str, Path] = field(default_factory=dict)
    described: Mapping[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> bool:
        """Whether a component is a file of its own."""
        return any(path.is_file() for path in self.components.values())

    def read(self, component: str) -> Stored:
        """The component or text encoder of that name, as its layout says. Raises CheckpointError."""
        path = self.components.get(component) or self.encoders[component]
        spec = self.spec if component in self.components else ModelSpec(transformer=component, blocks=())
        if path.is_file():
            file = open_file(path, spec, self.described.get(component))
            return next(layout.read(file) for layout in LAYOUTS.values() if layout.suffix == path.suffix)
        folder = open_folder(path, spec, self.variant)
        for layout in LAYOUTS.values():
            if layout.recognizes(folder):
                return layout.read(folder)
        raise CheckpointError(
            "no config.json beside the weights", where=str(folder.path), hint="Fetch the checkpoint's config.json."
        )


def open_source(path: Path | Mapping[str, Path], variant: str | None = None, *, optional: bool = False) -> Source:
    """Find the components of a checkpoint.

    Args:
        path: a directory that is a pipeline, a cascade or one component; a single file that is one; or component -> its file
            or folder.
        variant: of its weight files, "fp16" as in diffusers; None takes the plain ones, or the one variant that there is.
        optional: whether a variant that there is none of is passed over.

    Raises:
        InputError: there is no such directory or file, or no such variant, or more than one to choose from.
        CheckpointError: it holds no component that mxdit knows.
    """
    if isinstance(path, Mapping):
        return _components_of(path)
    if os.path.isfile(path):
        return _components_of({"": path})
    if not os.path.isdir(path):  # which a path of any length may be asked
        raise InputError("no such directory", where=str(path))
    found = next(filter(None, (_components(path, spec) for spec in _families(path))), None)
    if found is None:
        folders = [*COMPONENTS, *(name for spec in SPECS.values() for name in spec.original_components)]
        raise CheckpointError(
            "no checkpoint that mxdit knows",
            where=str(path),
            expected=f"{INDEX}, {MODULAR}, {'/, '.join(folders)}/, or one component's .safetensors",
            hint="PyTorch .bin and .pth files are not read.",
        )
    return replace(found, variant=choose_variant(path, variant, optional=optional))


def _components_of(paths: Mapping[str, Path]) -> Source:
    """The source of components that are named one by one."""
    specs: dict[str, ModelSpec] = {}
    for name, path in paths.items():
        if not os.path.isfile(path):
            raise InputError("no such file", where=str(path))
        if path.suffix not in SUFFIXES:
            raise InputError(
                "not a file that mxdit reads",
                where=str(path),
                expected=" or ".join(SUFFIXES),
                hint="PyTorch .bin and .pth files are not read.",
            )
        tensors, _ = _read_file(path)
        fits = [spec for spec in SPECS.values() if _original(spec, tensors)]
        # Where the names are diffusers' it is the base's config.json that says of which family they are.
        specs[name] = fits[0] if fits else next(iter(SPECS.values()))
    spec = next(iter(specs.values()))
    if unknown := [name for name in paths if name and name not in spec.components]:
        raise InputError("no such component", where=unknown[0], expected=" or ".join(spec.components))
    if len(paths) > 1 and len({path.resolve() for path in paths.values()}) < len(paths):
        raise InputError("one file for two components", where=str(next(iter(paths.values()))))
    (first, *_) = paths.values()
    return Source(first if len(paths) == 1 else first.parent, spec, dict(paths), False)


def _read_file(path: Path) -> tuple[dict[str, Readable], dict[str, str]]:
    """The tensors of a single file, by names without a prefix, and its metadata."""
    tensors, metadata = read_gguf(path) if path.suffix == ".gguf" else read_safetensors(path)
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), "")
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        raise CheckpointError(
            f"the file holds more than the model: {len(others)} tensors do not begin with {prefix}",
            where=f"{path}: {others[0]}",
            hint="Take a file of the transformer alone.",
        )
    return {unprefixed(name): tensor for name, tensor in tensors.items()}, metadata


def _original(spec: ModelSpec, tensors: Mapping[str, Readable]) -> bool:
    """Whether tensors have the names of the family's own release."""
    marked = spec.original_mark is not None and any(name.startswith(spec.original_mark) for name in tensors)
    return marked and any(spec.from_original(name) not in (None, name) for name in tensors)


def open_file(path: Path, spec: ModelSpec, base: Path | None) -> Folder:
    """What a component's single file holds, with the config.json of a base's folder. Raises CheckpointError."""
    tensors, metadata = _read_file(path)
    config = read_json(base / CONFIG) if base is not None else None
    return Folder(path, spec, config, tensors, _original(spec, tensors), False, metadata)


def _families(path: Path) -> list[ModelSpec]:
    """The family that a config.json names, the only one to look for then; all where none does, as in an original release."""
    named = (_named(folder) for folder in (path, *(path / name for name in COMPONENTS)))
    return next(([SPECS[name]] for name in named if name is not None and name in SPECS), list(SPECS.values()))


def _named(folder: Path) -> str | None:
    """The class that a folder's config.json names, if it has one."""
    named = read_json(folder / CONFIG).get("_class_name") if (folder / CONFIG).is_file() else None
    return named if isinstance(named, str) else None


def _components(path: Path, spec: ModelSpec) -> Source | None:
    """The components that a directory has if it is of this family; None where it has none."""
    for file in _indexes(path):
        index = read_json(path / file)
        named = {name: index.get(name) for name in spec.components}
        present = [name for name, of in named.items() if isinstance(of, list) and of and of[0] is not None]
        absent = [name for name in present if not (path / name).is_dir()]
        if file == MODULAR:
            present = [name for name in present if name not in absent]
        elif absent:
            raise CheckpointError("a folder that the pipeline names is missing", where=str(path / absent[0]))
        if present:
            encoders = {
                name: path / name
                for name in TEXT_ENCODERS
                if isinstance(of := index.get(name), list) and of and of[-1] in PLAIN and (path / name).is_dir()
            }
            return Source(path, spec, {name: path / name for name in present}, True, encoders=encoders)
    folders = {ours: path / theirs for theirs, ours in spec.original_components.items()}
    there = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if there:
        lacking = [str(folder) for name, folder in folders.items() if name not in there]
        if lacking:
            raise CheckpointError(
                "one expert of the cascade is missing", where=lacking[0], hint="Name the expert's own folder for one."
            )
        return Source(path, spec, there, False)
    there = {name: path / name for name in spec.components if (path / name / CONFIG).is_file()}
    if there:  # components without the rest of a pipeline, as the original layout has them
        return Source(path, spec, there, False)
    # The files, or an index of files that are missing; or a base of which no more than config.json is there.
    if any(any(path.glob(pattern)) for pattern in ("*.safetensors*", DESCRIPTION)) or _named(path) == spec.transformer:
        return Source(path, spec, {"": path}, False)
    return None


def _indexes(path: Path) -> list[str]:
    """The files of a directory that say what its pipeline is made of; a model may be published with both."""
    return [name for name in (INDEX, MODULAR) if (path / name).is_file()]


def open_both(
    path: Path | Mapping[str, Path], base: Path | None, variant: str | None = None
) -> tuple[Source, Source | None]:
    """A checkpoint and its base, with one name for the component where each has just one: TI2V-5B's lies in no folder.

    `variant` is that of whichever has it. Raises InputError and CheckpointError as `open_source`, and CheckpointError for a base
    that has other components.
    """
    if base is None:
        return open_source(path, variant), None
    source, under = (open_source(p, variant, optional=True) for p in (path, base))
    if variant not in (None, source.variant, under.variant):
        choose_variant(source.path, variant)  # says what there is
    if len(source.components) == len(under.components) == 1:
        name = max(*source.components, *under.components)  # "" where the directory is the component itself
        source = replace(source, components=dict.fromkeys([name], *source.components.values()))
        under = replace(under, components=dict.fromkeys([name], *under.components.values()))
    if set(under.components) != set(source.components):
        raise CheckpointError(
            "the base has other experts",
            where=str(base),
            got=", ".join(under.components) or "one expert",
            expected=", ".join(filter(None, source.components)) or "one expert",
            hint="Say which each file is, as in transformer=FILE transformer_2=FILE; or name one expert's folder of the base."
            if source.files
            else None,
        )
    if source.files:
        source = replace(source, spec=under.spec, described=under.components)
    return source, under


def open_folder(path: Path, spec: ModelSpec, variant: str | None) -> Folder:
    """What a component's folder holds, by the names of its files' headers. Raises CheckpointError for damaged files."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    tensors = open_tensors(path, WEIGHTS if any(path.glob(WEIGHTS)) else "*.safetensors", variant)
    return Folder(path, spec, config, tensors, _original(spec, tensors), described(path, config))


def is_packed(folder: Path) -> bool:
    """Whether a text encoder's config.json says that mxdit packed it. Raises CheckpointError for a damaged one."""
    return (folder / CONFIG).is_file() and is_stated(read_json(folder / CONFIG).get("quantization_config"))


def rest_of(source: Source, beside: Collection[str] = ()) -> tuple[dict[str, Path], dict[str, Mapping[str, Any]]]:
    """What a pipeline holds beside its components, and beside text encoders that are named.

    Of weights that a folder has in variants, one is taken, under its plain name.

    Returns:
        The files to take over, by their paths in the pipeline; and JSON files to write, what says of what it is made the last.

    Raises CheckpointError for a file or folder that cannot be read, and an index that names a file that is not there.
    """
    if not source.pipeline:
        return {}, {}
    carried: dict[str, Path] = {}
    indexes: dict[str, Mapping[str, Any]] = {}
    left, last = {*source.components, *beside}, _indexes(source.path)
    seen = {source.path.resolve()}  # a folder may be a link, as a hub's cache has them, and a link may lead in circles
    for folder, folders, files in os.walk(source.path, onerror=_refuse, followlinks=True):
        inside = Path(folder).relative_to(source.path)
        inner = {name: (Path(folder) / name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [n for n, real in inner.items() if real not in seen and str(inside / n) not in left]
        seen.update(inner[name] for name in folders)
        for file, plain in taken(sorted(files), source.variant).items():
            path, name = Path(folder) / file, str(inside / plain)
            if file.startswith(".") or str(inside / file) in last:
                continue
            if not path.is_file():
                raise CheckpointError("not a file, or a link to none", where=str(path), hint="Fetch the model again.")
            weight_map = read_index(path) if is_index(file) else {}  # which finds files that are missing
            if weight_map and file != plain:
                indexes[name] = {**read_json(path), "weight_map": {t: plain_name(of) for t, of in weight_map.items()}}
            else:
                carried[name] = path
    return carried, {**indexes, **{name: read_json(source.path / name) for name in last}}


def _refuse(error: OSError) -> None:
    raise unreadable(error)
