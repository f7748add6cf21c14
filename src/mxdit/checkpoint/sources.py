"""Which layout a directory is in, and its experts by our names.

Layouts differ in names, in folders, and in where they say what is quantized. `open_source` tells them apart by what is there,
never by a guess; docs/checkpoints.md has the table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mxdit.checkpoint.experts import Stored
from mxdit.checkpoint.files import StoredTensor, open_tensors, read_json
from mxdit.checkpoint.layouts.modelslim import DESCRIPTION, TYPES, WEIGHTS, read_description, types_of, without_wrappers
from mxdit.checkpoint.layouts.vllm_omni import SERIALIZED
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError, InputError
from mxdit.models import COMPONENTS, SPECS, ModelSpec

CONFIG = "config.json"
INDEX = "model_index.json"


@dataclass(frozen=True)
class Source:
    """A directory of a checkpoint.

    experts   component -> its folder; the name is "" for a directory that is one expert itself.
    pipeline  whether the directory is a diffusers pipeline, with text encoder and the rest.
    """

    path: Path
    spec: ModelSpec
    experts: Mapping[str, Path]
    pipeline: bool

    def read(self, component: str) -> Stored:
        """The expert of that name."""
        return _read(self.experts[component], self.spec)


def open_source(path: Path) -> Source:
    """Find the experts of a checkpoint's directory.

    Raises:
        InputError: there is no such directory.
        CheckpointError: it holds no expert that mxdit knows.
    """
    if not os.path.isdir(path):  # which a path of any length may be asked
        raise InputError("no such directory", where=str(path))
    for spec in _families(path):
        if (path / INDEX).is_file():
            index = read_json(path / INDEX)
            named = {name: index.get(name) for name in spec.components}
            present = [name for name, of in named.items() if isinstance(of, list) and of and of[0] is not None]
            missing = [name for name in present if not (path / name).is_dir()]
            if missing:
                raise CheckpointError("a folder that the pipeline names is missing", where=str(path / missing[0]))
            if present:
                return Source(path, spec, {name: path / name for name in present}, True)
        folders = {ours: path / theirs for theirs, ours in spec.original_components.items()}
        there = {name: folder for name, folder in folders.items() if folder.is_dir()}
        if there:
            absent = [str(folder) for name, folder in folders.items() if name not in there]
            if absent:
                raise CheckpointError(
                    "one expert of the cascade is missing",
                    where=absent[0],
                    hint="Name the expert's own folder for one.",
                )
            return Source(path, spec, there, False)
        there = {name: path / name for name in spec.components if (path / name / CONFIG).is_file()}
        if there:  # experts without the rest of a pipeline, as the original layout has them
            return Source(path, spec, there, False)
        if any(path.glob("*.safetensors")) or any(path.glob(DESCRIPTION)):
            return Source(path, spec, {"": path}, False)
    raise CheckpointError(
        "no checkpoint that mxdit knows",
        where=str(path),
        expected="model_index.json, transformer/, high_noise_model/ and low_noise_model/, or one expert's .safetensors",
        hint="PyTorch .bin and .pth files are not read.",
    )


def _families(path: Path) -> list[ModelSpec]:
    """The family that a config.json names, the only one to look for then; all where none does, as in an original release."""
    for folder in (path, *(path / name for name in COMPONENTS)):
        if (folder / CONFIG).is_file():
            named = read_json(folder / CONFIG).get("_class_name")
            if isinstance(named, str) and named in SPECS:
                return [SPECS[named]]
    return list(SPECS.values())


def open_both(path: Path, base: Path | None) -> tuple[Source, Source | None]:
    """A checkpoint and its base, with one name for the expert where each has just one: TI2V-5B's lies in no folder."""
    source, under = open_source(path), open_source(base) if base is not None else None
    if under is not None and len(source.experts) == len(under.experts) == 1:
        name = max(*source.experts, *under.experts)  # "" where the directory is the expert itself
        source = replace(source, experts=dict.fromkeys([name], *source.experts.values()))
        under = replace(under, experts=dict.fromkeys([name], *under.experts.values()))
    return source, under


def _read(folder: Path, spec: ModelSpec) -> Stored:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    quantized = any(folder.glob(WEIGHTS))
    # vLLM-Omni's merge tools leave a description, too, which their loader never reads: there config.json counts.
    stated = config.get("quantization_config") if config else None
    described = any(folder.glob(DESCRIPTION)) and (quantized or stated is None)
    if quantized and not described:
        read_description(folder)  # says what is missing
    tensors = open_tensors(folder, WEIGHTS if quantized else "*.safetensors")
    mark = spec.original_mark
    original = mark is not None and any(name.startswith(mark) for name in tensors)
    original = original and any(spec.from_original(name) not in (None, name) for name in tensors)
    if described:
        plain = without_wrappers(tensors)
        names = {name: (spec.from_original(short) or short) if original else short for name, short in plain.items()}
        description = read_description(folder)
        # Layers that it calls quantized and the files lack, too: they are missing, and not the base's to give.
        said = {name: short for name, short in without_wrappers(description).items() if str(description[name]) in TYPES}
        said = {name: (spec.from_original(short) or short) if original else short for name, short in said.items()}
        methods, activation = types_of(description, {**said, **names}, folder)
        ours = _renamed(tensors, names, folder)
        usable = config if config and config.get("_class_name") == spec.transformer else None
        layout = "modelslim" if original else "sglang"
        marks = [key for key in description if key.endswith(".quant_type") or key == "fa_quant_type"]
        lost = (f"{len(marks)} marks of quantized attention ({marks[0]}: {description[marks[0]]})",) if marks else ()
        return Stored(folder, layout, ours, usable, None, methods, activation, description, lost)
    if config is None:
        raise CheckpointError(
            "no config.json beside the weights", where=str(folder), hint="Fetch the checkpoint's config.json."
        )
    if original:
        names = {name: spec.from_original(name) or name for name in tensors}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        assert spec.original_config is not None
        try:
            ours_config = spec.original_config(config, shapes)
        except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                "the original model's config lacks what describes it", where=str(folder / CONFIG), got=repr(error)
            ) from None
        return Stored(folder, "original", _renamed(tensors, names, folder), ours_config)
    if stated is None:
        return Stored(folder, "diffusers", tensors, config)
    if isinstance(stated, Mapping) and "layout" in stated:
        return Stored(folder, "packed", tensors, config, MXConfig.from_dict(stated))
    return Stored(folder, "vllm-omni", tensors, config, _foreign_config(stated, tensors, spec, folder))


def _renamed(tensors: Mapping[str, StoredTensor], names: Mapping[str, str], folder: Path) -> dict[str, StoredTensor]:
    ours: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if names[name] in ours:
            raise CheckpointError(
                "two tensors are one by name", where=str(folder), got=f"{ours[names[name]].name} and {name}"
            )
        ours[names[name]] = tensor
    return ours


def _foreign_config(stated: object, tensors: Mapping[str, StoredTensor], spec: ModelSpec, folder: Path) -> MXConfig:
    """vLLM-Omni's `quantization_config` as ours, but for its own names in `ignored_layers`, which the files decide."""
    if not isinstance(stated, Mapping):
        raise CheckpointError("quantization_config is no object", where=str(folder / CONFIG), got=repr(stated))
    method = str(stated.get("quant_method")).lower().replace("-", "_")
    flag = SERIALIZED.get(method)
    if flag and not stated.get(flag) and not stated.get("is_checkpoint_serialized"):
        raise CheckpointError(
            "the config does not say that the weights are quantized already",
            where=str(folder / CONFIG),
            got=f"{flag} {stated.get(flag)!r}",
            expected="true",
            hint="vLLM-Omni would quantize them once more. Set the key, or restore the file.",
        )
    paths: dict[str, list[str]] = {}
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            paths.setdefault(spec.runtime_name(path, "vllm-omni"), []).append(path)
    keys: dict[str, Any] = {k: v for k, v in stated.items() if k not in ("num_bf16_fallback_layers", "quant_method")}
    if method == "mxfp4":
        keys.setdefault("mxfp4_scale_alg", 0)  # its default
    config = MXConfig.from_dict({**keys, "quant_method": method})
    raised = [path for name in config.w4a8_fallback_layers for path in paths.get(name, [])]
    linears = {path for path in (n.removesuffix(".weight_scale") for n in tensors) if f"{path}.weight_scale" in tensors}
    if raised and set(raised) == linears:
        return replace(config, activation="mxfp8", w4a8_fallback_layers=())
    return replace(config, w4a8_fallback_layers=tuple(raised))
