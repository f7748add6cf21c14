"""The weight files of a checkpoint's folders: which there are, in which variant, and the tensors that they hold.

diffusers and transformers save a variant under another name: `model.fp16.safetensors`, its shards as
`model.fp16-00001-of-00002.safetensors` (older diffusers: `model-00001-of-00002.fp16.safetensors`), and their index as
`model.safetensors.index.fp16.json`. A folder may hold several variants beside the plain files, which have none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mxdit.checkpoint.files import StoredTensor, brief, is_name, read_header, read_json
from mxdit.errors import CheckpointError, InputError

_STEM = "(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(rf"{_STEM}(\.(?P<a>[^.]+?))?(?P<shard>{_SHARD})?(\.(?P<b>[^.]+))?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(rf"{_STEM}\.(?P<kind>safetensors|bin)(\.(?P<a>[^.]+))?\.index(\.(?P<b>[^.]+))?\.json")


def _parsed(name: str) -> re.Match[str] | None:
    found = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
    return None if found is None or (found["a"] and found["b"]) else found


def variant_of(name: str) -> str | None:
    """The variant that a weight file or an index is of; None for plain ones, and for every other file."""
    found = _parsed(name)
    return found and (found["a"] or found["b"])


def plain_name(name: str) -> str:
    """The name of a weight file or an index without its variant; of any other file, as it is."""
    found = _parsed(name)
    if found is None:
        return name
    if is_index(name):
        return f"{found['stem']}.{found['kind']}.index.json"
    return f"{found['stem']}{found['shard'] or ''}.{found['kind']}"


def is_index(name: str) -> bool:
    """Whether a file is the index of shards."""
    return _INDEX.fullmatch(name) is not None


def taken(names: Sequence[str], variant: str | None) -> dict[str, str]:
    """Of a folder's files, those that are in use where a variant is asked for, and their plain names.

    Weights are taken in that variant where the folder has it, else from the plain files. A folder that has neither is taken
    as it is.
    """
    there = variants(names)
    chosen = variant if variant in there else None
    if chosen not in there:
        return {name: name for name in names}
    return {name: plain_name(name) for name in names if _parsed(name) is None or variant_of(name) == chosen}


def variants(names: Sequence[str]) -> set[str | None]:
    """The variants that there are of a folder's weights, None for plain ones; `names` are those of its files.

    Where there are .safetensors files they count, else the .bin files.
    """
    safe = [name for name in names if name.endswith(".safetensors")]
    weights = [name for name in safe or names if _WEIGHTS.fullmatch(name)]
    return {variant_of(name) for name in weights or safe}


def choose_variant(path: Path, asked: str | None = None, *, optional: bool = False) -> str | None:
    """The variant in which the weights of a checkpoint are read, as diffusers' `variant=` means it; None for plain files.

    Folders that lack it are read from their plain files. Without `asked` it is the one variant of the folders that have no
    plain files, if there are such.

    Args:
        path: a pipeline, a cascade or one component.
        asked: by the caller, or None.
        optional: whether `asked` counts only where there is such a variant.

    Raises:
        InputError: no folder has that variant, a folder has only others, or folders without plain files leave a choice.
        CheckpointError: a folder cannot be read.
    """
    folders = [path, *(path / name for name in names_in(path) if not name.startswith(".") and (path / name).is_dir())]
    there = {folder: variants(names_in(folder)) for folder in folders}
    known = set().union(*there.values()) - {None}
    if asked in known or (asked is not None and not optional):
        lacking = [folder for folder, found in there.items() if asked in known and found and not found & {asked, None}]
        if asked not in known or lacking:
            expected = there[lacking[0]] if lacking else known
            raise InputError(
                "no weights of this variant",
                field="variant",
                where=str(lacking[0] if lacking else path),
                got=asked,
                expected=" or ".join(sorted(map(str, expected))) or "none, the files are plain",
            )
        return asked
    only = {name for found in there.values() if None not in found for name in found}
    if len(only) > 1:
        raise InputError(
            "the weights are there in more than one variant",
            field="variant",
            where=str(path),
            got=", ".join(sorted(map(str, only))),
            hint="Name one of them, or load a directory that has one only.",
        )
    return only.pop() if only else None


def names_in(folder: Path) -> list[str]:
    """The names of a folder's entries, sorted. Raises CheckpointError for a folder that cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(error) from None


def unreadable(error: OSError) -> CheckpointError:
    """The error of a folder that cannot be read."""
    return CheckpointError("the folder cannot be read", where=str(error.filename), got=error.strerror)


def open_tensors(folder: Path, pattern: str = "*.safetensors", variant: str | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's folder, by name: the files that its index lists, or all that match.

    Args:
        folder: where they lie.
        pattern: of the files' names.
        variant: the one to read where the folder has it.

    Raises:
        CheckpointError: there are none, there are two indexes, the index and the files disagree, a file it names lies
            elsewhere or is missing, or two files hold one name.
    """
    files = sorted(folder.glob(pattern))
    indexes = sorted(folder.glob(f"{pattern}.*index*.json"))
    chosen = variant if any(variant_of(path.name) == variant for path in (*files, *indexes)) else None
    files, indexes = ([p for p in paths if variant_of(p.name) == chosen] for paths in (files, indexes))
    if len(indexes) > 1:
        raise CheckpointError(
            "more than one index", where=str(folder), got=", ".join(p.name for p in indexes), expected="one"
        )
    weight_map = None
    if indexes:
        weight_map = read_index(indexes[0])
        files = [folder / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise CheckpointError("no weights", where=str(folder), expected=f"files named {pattern}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    "a tensor is in two files",
                    where=str(folder),
                    got=f"{name} in {tensors[name].file.name} and {file.name}",
                )
            tensors[name] = tensor
    if weight_map is not None:
        wrong = [
            n
            for n in sorted(tensors.keys() | weight_map)
            if n not in tensors or weight_map.get(n) != tensors[n].file.name
        ]
        if wrong:
            held = tensors[wrong[0]].file.name if wrong[0] in tensors else "no file"
            raise CheckpointError(
                f"the index and the files disagree on {len(wrong)} tensors",
                where=str(indexes[0]),
                got=f"{wrong[0]} in {held}",
                expected=f"in {weight_map.get(wrong[0], 'no file')}",
                hint="A shard is from another download: fetch them all again.",
            )
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor -> file, which is there, beside it.

    Raises CheckpointError for an index that says anything else.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=str(index))
    suffix = ".bin" if ".bin." in index.name else ".safetensors"
    for name, file in weight_map.items():
        if not is_name(name):
            raise CheckpointError("not the name of a tensor", where=str(index), got=brief(name))
        # A plain name beside the index, so that no index reaches out of its folder.
        if (
            not isinstance(file, str)
            or os.path.basename(file) != file
            or "\\" in file
            or not file.isprintable()
            or not file.endswith(suffix)
        ):
            raise CheckpointError(
                "the index names a file that is none of its folder's",
                where=f"{index}: {name}",
                got=brief(file),
                expected=f"the plain name of a {suffix} file",
            )
    missing = sorted({file for file in weight_map.values() if not os.path.lexists(index.parent / file)})
    if missing:
        raise CheckpointError(
            "a file that the index names is missing",
            where=str(index.parent / missing[0]),
            got=f"{len(missing)} of {len(set(weight_map.values()))} files missing",
            hint="Download or convert the model again.",
        )
    return weight_map
