"""A component in one file, as ComfyUI takes it: a .safetensors file in codes of several kinds, or a GGUF file.

Names are those of the model's own release or diffusers', perhaps behind a prefix. There is no config.json: what the shapes do
not say is known for the sizes that were published, or comes from the config.json of a base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from mxdit.checkpoint.coded import Decoded, Decoding, decoded
from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.layout import Folder, Layout
from mxdit.errors import CheckpointError
from mxdit.models import SPECS, ModelSpec


def _recognizes(folder: Folder) -> bool:
    return False  # a folder is in none of them, and a file is told by its suffix


def _read_comfyui(folder: Folder) -> Stored:
    spec = folder.spec

    def inside(path: str) -> bool:
        return spec.place_of(_ours(spec, path)) is not None

    return _stored(COMFYUI, folder, decoded(folder.tensors, folder.metadata, inside, folder.path.name))


def _read_gguf(folder: Folder) -> Stored:
    said, known = folder.metadata.get("general.architecture"), folder.spec.gguf
    if said is not None and said != known:
        raise CheckpointError(
            "a GGUF file of another architecture", where=str(folder.path), got=repr(said), expected=repr(known)
        )
    return _stored(GGUF, folder, Decoding(dict(folder.tensors)))


def _stored(layout: Layout, folder: Folder, found: Decoding) -> Stored:
    shapes = {name: tensor.info.shape for name, tensor in found.tensors.items()}
    config = _config(folder, shapes)
    spec = folder.spec
    tensors = Folder(folder.path, spec, config, found.tensors, folder.original, False).renamed(lambda n: _ours(spec, n))
    said = {_ours(spec, path): method for path, method in found.methods.items()}
    methods = {name.removesuffix(".weight"): None for name in tensors if name.endswith(".weight")} | said
    return Stored(
        folder.path,
        layout.name,
        tensors,
        config,
        methods=methods if said else None,
        decoded={name for name, tensor in tensors.items() if isinstance(tensor, Decoded)},
        about=tuple(_about(folder, found)),
    )


def _ours(spec: ModelSpec, name: str) -> str:
    return spec.from_original(name) or name


def _config(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' config of the model: by the base's config.json, else by the sizes that were published."""
    spec, stated = folder.spec, folder.config
    if stated is not None and stated.get("_class_name") in SPECS:
        return {key: value for key, value in stated.items() if key != "quantization_config"}
    try:
        if stated is None and folder.original and spec.original_sizes:
            stated = spec.original_sizes(shapes)
        if stated is not None and spec.original_config:
            return spec.original_config(stated, shapes)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            "the file lacks what tells its model's size", where=str(folder.path), got=f"no {error.args[0]}"
        ) from None
    raise CheckpointError(
        "a file says nothing of the model's heads and such, and these are not the sizes of a published one",
        where=str(folder.path),
        hint="Name a directory with its config.json: --base DIR.",
    )


def _about(folder: Folder, found: Decoding) -> list[str]:
    names = f"{folder.spec.transformer} under {'its release' if folder.original else 'diffusers'}'s names"
    kinds = Counter(map(_kind, found.tensors.values()))
    lines = [f"a single file: {names}, {len(found.tensors)} tensors"]
    for exact, how in ((True, "read exactly"), (False, "decoded")):
        counts = [f"{count} {kind}" for (kind, of), count in sorted(kinds.items()) if of is exact]
        if counts:
            lines.append(f"{how}: {', '.join(counts)}")
    if found.ignored:
        lines.append(f"ignored: {len(found.ignored)} scales of activations, which are quantized as they come")
    return lines


def _kind(tensor: Readable) -> tuple[str, bool]:
    if isinstance(tensor, Decoded):
        return tensor.kind, tensor.exact
    dtype = tensor.info.dtype
    eight = dtype in (torch.uint8, torch.float8_e4m3fn)  # which stay only in an MXFP8 layer
    return "MXFP8 codes" if eight else str(dtype).removeprefix("torch."), True


COMFYUI = Layout("comfyui", _recognizes, _read_comfyui, quantized=False, suffix=".safetensors")
GGUF = Layout("gguf", _recognizes, _read_gguf, quantized=False, suffix=".gguf")
