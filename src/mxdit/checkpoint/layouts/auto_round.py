"""AutoRound's layout of MXFP8 and MXFP4: diffusers names, packed codes, `quant_method` "auto-round".

A layer in eight bits has `weight` (F8_E4M3) and `weight_scale` (E8M0 bytes, row-major); one in four has `weight_packed` (two
codes in a byte, the first in the low half) in place of `weight`; a layer without scales is float. `extra_config` has what differs
from layer to layer. Source: intel/auto-round, `export_to_autoround/qlinear_fp.py`, `export_to_nvfp_mxfp.py`,
`utils.py` (`filter_quantization_config`); vLLM-Omni 0.30 reads it by `quantization/inc_config.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.files import brief
from mxdit.checkpoint.layout import CONFIG, Folder, Layout
from mxdit.errors import CheckpointError

NAMES = ("auto-round", "auto_round")
METHODS = {8: "mxfp8", 4: "mxfp4"}
PACKED = "weight_packed"
# (bits, act_bits) that a layer of mxdit has: W8A8, W4A4, W4A8. A config without act_bits is one for weights alone.
SCHEMES = ((8, 8), (4, 4), (4, 8))
KIND = {"data_type": "mx_fp", "group_size": 32, "sym": True, "act_data_type": "mx_fp", "act_group_size": 32}


def recognizes(folder: Folder) -> bool:
    return folder.named and isinstance(folder.stated, Mapping) and folder.stated.get("quant_method") in NAMES


def read(folder: Folder) -> Stored:
    where, said = f"{folder.path / CONFIG}: quantization_config", folder.stated
    _check(said, where)
    tensors = folder.renamed(lambda name: name.removesuffix(PACKED) + "weight" if name.endswith(f".{PACKED}") else name)
    methods = {path: _method(folder, path) for name in tensors if (path := name.removesuffix(".weight")) != name}
    own = _own(said, methods, where)
    raised = []
    for path, method in methods.items():
        layer = {**said, **own.get(path, {})}
        bits = layer["bits"]
        if method != (METHODS.get(bits) if isinstance(bits, int) else "") and (method or path in own):
            raise CheckpointError(
                "the config says something else of a layer than the files",
                where=f"{where}: {path}",
                got=f"{method or 'floats'} stored",
                expected=f"bits {brief(bits)}",
            )
        if method:
            _check(layer, f"{where}: {path}")
            if (bits, layer["act_bits"]) == (4, 8):
                raised.append(path)
    return Stored(folder.path, AUTO_ROUND.name, tensors, folder.config, methods=methods, raised=tuple(raised))


def _method(folder: Folder, path: str) -> str | None:
    if f"{path}.weight_scale" not in folder.tensors:
        return None
    return METHODS[4 if f"{path}.{PACKED}" in folder.tensors else 8]


def _own(said: Mapping[str, Any], layers: Collection[str], where: str) -> dict[str, Mapping[str, Any]]:
    """Layer -> what `extra_config` says of it where that differs from the rest. AutoRound writes it layer by layer."""
    extra = said.get("extra_config") or {}
    for path, own in extra.items() if isinstance(extra, Mapping) else [("extra_config", extra)]:
        if path not in layers or not isinstance(own, Mapping):
            raise CheckpointError(
                "extra_config has something else than keys of a layer that is in the files",
                where=f"{where}: {path}",
                got=brief(own),
                hint="Patterns are not read. The files may be of another model.",
            )
    return dict(extra)


def _check(said: Mapping[str, Any], where: str) -> None:
    """Refuse what mxdit has no layer for, in the config or in what it comes to for one layer."""
    for key, value in KIND.items():
        if said.get(key, value) != value or "data_type" not in said:
            raise CheckpointError(
                "an AutoRound checkpoint of another kind than MXFP8 and MXFP4",
                where=where,
                got=f"{key} {said.get(key)!r}",
                expected=repr(value),
                hint="Quantize the model's BF16 release.",
            )
    scheme = (said.get("bits"), said.get("act_bits"))
    if scheme not in SCHEMES:
        raise CheckpointError(
            "an AutoRound scheme that mxdit does not have",
            where=where,
            got=f"bits {scheme[0]}, act_bits {scheme[1]}",
            expected=" or ".join(f"{bits} and {act}" for bits, act in SCHEMES),
            hint="Quantize the model's BF16 release.",
        )


AUTO_ROUND = Layout("auto-round", recognizes, read, scale_alg=0)
