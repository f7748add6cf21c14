"""What msModelSlim and SGLang's repack of it say of a quantized model: `quant_model_description*.json`.

It maps tensor names to types. Keys that name no tensor ("version", "group_size", "model_quant_type", "X.quant_type") stand
among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.files import read_json
from mxdit.checkpoint.layout import Folder
from mxdit.errors import CheckpointError

DESCRIPTION = "quant_model_description*.json"
WEIGHTS = "quant_model_weight*.safetensors"
# Type of a weight -> (method, activation).
TYPES: Mapping[str, tuple[str | None, str | None]] = {
    "FLOAT": (None, None),
    "W4A4_MXFP4": ("mxfp4", None),
    "W4A4_MXFP4_DUALSCALE": ("mxfp4_dualscale", None),
    "W8A8_MXFP8": ("mxfp8", None),
    "W4A8_MXFP": ("mxfp4", "mxfp8"),
}
# The same the other way round.
NAMES: Mapping[tuple[str | None, str | None], str] = {means: name for name, means in TYPES.items()}


def described(folder: Path, config: Mapping[str, Any] | None) -> bool:
    """Whether a description is what says how the component in a folder is quantized, given its config.json.

    vLLM-Omni's merge tools leave a description, too, which their loader never reads: there config.json counts.
    """
    stated = config.get("quantization_config") if config else None
    return any(folder.glob(WEIGHTS)) or (stated is None and any(folder.glob(DESCRIPTION)))


def read_described(folder: Folder, layout: str, ours: Callable[[str], str]) -> Stored:
    """The component of a folder with a description; `ours` gives our name of a tensor whose wrapper is off."""
    description = read_description(folder.path)
    names = {name: ours(short) for name, short in without_wrappers(folder.tensors).items()}
    # Layers that it calls quantized and the files lack, too: they are missing, and not the base's to give.
    plain = without_wrappers(description)
    said = {name: ours(short) for name, short in plain.items() if str(description[name]) in TYPES}
    methods, raised = types_of(description, {**said, **names}, folder.path)
    config = folder.config
    usable = config if config and config.get("_class_name") == folder.spec.transformer else None
    marks = [key for key in description if key.endswith(".quant_type") or key == "fa_quant_type"]
    lost = (f"{len(marks)} marks of quantized attention ({marks[0]}: {description[marks[0]]})",) if marks else ()
    tensors = folder.renamed(names.__getitem__)
    return Stored(folder.path, layout, tensors, usable, None, methods, raised, description, lost)


def read_description(folder: Path) -> dict[str, Any]:
    """The description of the model in `folder`. Raises CheckpointError where there is none, or more than one."""
    found = sorted(folder.glob(DESCRIPTION))
    if len(found) != 1:
        raise CheckpointError(
            "no description of the quantized model" if not found else "more than one description",
            where=str(folder),
            got=", ".join(path.name for path in found) or None,
            expected=DESCRIPTION,
            hint="Without it nothing tells FP4 values, MXFP8 codes and float weights apart: fetch it again.",
        )
    return read_json(found[0])


def types_of(
    description: Mapping[str, Any], names: Mapping[str, str], where: Path
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """What a description says of the linears.

    Args:
        description: as read.
        names: tensor name in the files -> ours.
        where: for errors.

    Returns:
        linear -> method (None for float), and the MXFP4 linears whose type says MXFP8 activations.
    """
    methods: dict[str, str | None] = {}
    raised = []
    for name, ours in names.items():
        path, _, leaf = ours.rpartition(".")
        if leaf != "weight" or name not in description:
            continue
        kind = description[name]
        if not isinstance(kind, str) or kind not in TYPES:
            raise CheckpointError(
                "mxdit does not read layers of this type",
                where=f"{where}: {name}",
                got=repr(kind),
                expected=", ".join(TYPES),
            )
        methods[path], activation = TYPES[kind]
        if activation:
            raised.append(path)
    return methods, tuple(raised)


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Tensor names -> the same without the `.linear.` and `.div.` of smoothed layers."""
    plain = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > 2 and ((parts[-2] == "linear") or parts[-2:] == ["div", "mul_scale"]):
            del parts[-2]
        plain[name] = ".".join(parts)
    return plain
