"""AutoRound's layout of MXFP8 and MXFP4: diffusers names, packed codes, `quant_method` "auto-round".

A layer in eight bits has `weight` (F8_E4M3) and `weight_scale` (E8M0 bytes, row-major); one in four has `weight_packed` (two
codes in a byte, the first in the low half) in place of `weight`; a layer without scales is float. Source: intel/auto-round,
`export_to_autoround/qlinear_fp.py` and `export_to_nvfp_mxfp.py`; vLLM-Omni 0.30 reads it by `quantization/inc_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.layout import CONFIG, Folder, Layout
from mxdit.errors import CheckpointError

NAMES = ("auto-round", "auto_round")
METHODS = {8: "mxfp8", 4: "mxfp4"}
PACKED = "weight_packed"
# (bits, act_bits) that a layer of mxdit has: W8A8, W4A4, W4A8.
SCHEMES = ((8, 8), (4, 4), (4, 8))


def recognizes(folder: Folder) -> bool:
    return folder.named and isinstance(folder.stated, Mapping) and folder.stated.get("quant_method") in NAMES


def read(folder: Folder) -> Stored:
    where, said = f"{folder.path / CONFIG}: quantization_config", folder.stated
    wanted = {"data_type": "mx_fp", "group_size": 32, "sym": True, "act_data_type": "mx_fp"}
    for key, value in wanted.items():
        if said.get(key, value) != value or "data_type" not in said:
            raise CheckpointError(
                "an AutoRound checkpoint of another kind than MXFP8 and MXFP4",
                where=where,
                got=f"{key} {said.get(key)!r}",
                expected=repr(value),
                hint="Quantize the model's BF16 release.",
            )
    scheme = (said.get("bits"), said.get("act_bits", said.get("bits")))
    if scheme not in SCHEMES:
        raise CheckpointError(
            "an AutoRound scheme that mxdit does not have",
            where=where,
            got=f"bits {scheme[0]}, act_bits {scheme[1]}",
            expected=" or ".join(f"{bits} and {act}" for bits, act in SCHEMES),
            hint="Quantize the model's BF16 release.",
        )
    tensors = folder.renamed(lambda name: name.removesuffix(PACKED) + "weight" if name.endswith(f".{PACKED}") else name)
    methods = {path: _method(folder, path) for name in tensors if (path := name.removesuffix(".weight")) != name}
    raised = tuple(path for path, method in methods.items() if method == "mxfp4") if scheme == (4, 8) else ()
    _check(said, methods, where)
    return Stored(folder.path, AUTO_ROUND.name, tensors, folder.config, methods=methods, raised=raised)


def _method(folder: Folder, path: str) -> str | None:
    if f"{path}.weight_scale" not in folder.tensors:
        return None
    return METHODS[4 if f"{path}.{PACKED}" in folder.tensors else 8]


def _check(said: Mapping[str, Any], methods: Mapping[str, str | None], where: str) -> None:
    """The config must say of each layer what the files hold: `extra_config` has those that differ."""
    extra = said.get("extra_config")
    extra = extra if isinstance(extra, Mapping) else {}
    for path, method in methods.items():
        own = extra.get(path)
        bits = own.get("bits", said["bits"]) if isinstance(own, Mapping) else said["bits"]
        if method != METHODS.get(bits) and (method or path in extra):
            raise CheckpointError(
                "the config says something else of a layer than the files",
                where=f"{where}: {path}",
                got=f"{method or 'floats'} stored",
                expected=f"bits {bits}",
            )


AUTO_ROUND = Layout("auto-round", recognizes, read, scale_alg=0)
