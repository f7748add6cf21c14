"""Weights in the codes of other tools' single files: how each says what it is, and what it means.

Sources of the facts: ComfyUI's `QUANTIZATION.md`, `comfy/quant_ops.py`, `comfy/ops.py` and `comfy/utils.py` (`comfy_quant`,
`_quantization_metadata`, `scaled_fp8`), and the layouts and reference kernels of `comfy_kitchen` (scales in cuBLAS's order of
128 x 4 tiles, the first of two FP4 codes in the high half of a byte). docs/checkpoints.md has the table.

What no rule here explains is an error that names it: never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxdit.checkpoint.files import Readable, brief
from mxdit.checkpoint.layouts.numeric import unpack
from mxdit.errors import CheckpointError
from mxdit.numerics.codec import Packed, decode
from mxdit.numerics.formats import FLOATS, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of a model in a file of ComfyUI's
CONFIGURATION, MARKER = "comfy_quant", "scaled_fp8"
SCALES = ("scale_weight", "weight_scale", "weight_scale_2")
UNUSED = ("scale_input", "input_scale")  # of activations, which mxdit quantizes as they come
EIGHT = {torch.float8_e4m3fn: "FP8 E4M3", torch.float8_e5m2: "FP8 E5M2"}
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "mxfp8": None, "nvfp4": None}
# Keys of a layer's configuration that do not change what its weight is.
HARMLESS = {"format", "full_precision_matrix_mult", "group_size", "orig_dtype"}
HINT = "Take the model's BF16 file, or one that docs/checkpoints.md says is read."


@dataclass(frozen=True)
class Decoded:
    """A tensor that is made of what a file holds.

    file, name, nbytes  of the tensor in the file.
    info   shape and dtype of what is made.
    read   makes it. Raises CheckpointError.
    kind   how it is stored, in words.
    exact  whether what is made is the very codes or numbers of the file, in their dtype.
    """

    file: Path
    name: str
    nbytes: int
    info: TensorInfo
    read: Callable[[], Tensor]
    kind: str
    exact: bool = False


@dataclass
class Decoding:
    """What a file's tensors are.

    tensors  the model's own, in mxdit's form: floats, or MXFP8 codes with row-major scales.
    methods  layer -> method, for those that stay in codes.
    ignored  tensors that say nothing about the weights.
    """

    tensors: dict[str, Readable] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def decoded(
    tensors: Mapping[str, Readable], metadata: Mapping[str, str] | None, inside: Callable[[str], bool], where: str
) -> Decoding:
    """Tell what the tensors of a single file are, without reading more of them than the layers' configurations.

    Args:
        tensors: of the file, by names without a prefix.
        metadata: of the file's header; None where a host has read the file and does not pass it on.
        inside: whether a layer may stay in codes; the MXFP8 of others is decoded.
        where: for errors.

    Raises CheckpointError for scales and codes that no rule explains.
    """
    found, layers = Decoding(), _configurations(tensors, metadata or {}, where)
    marked = MARKER in tensors
    stated = any(FORMATS[said["format"]] for said in layers.values())
    scaled = marked or stated or any(name.endswith(".scale_weight") for name in tensors)
    used = {MARKER, *(f"{layer}.{CONFIGURATION}" for layer in layers)}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if name == MARKER:
            continue
        if leaf in UNUSED:
            found.ignored.append(name)
            used.add(name)
        elif leaf == "weight" and path in layers:
            used |= {name, *_layer(found, path, layers[path], tensors, inside)}
        elif leaf == "weight" and f"{path}.scale_weight" in tensors:
            found.tensors[name] = _scaled(tensor, tensors[f"{path}.scale_weight"])
            used |= {name, f"{path}.scale_weight"}
        elif tensor.info.dtype in EIGHT and leaf not in SCALES:
            if scaled and leaf == "weight":
                raise CheckpointError(
                    "a weight in FP8 without its scale, in a file of scaled ones",
                    where=_of(tensor),
                    expected=f"{path}.{'weight_scale' if stated else 'scale_weight'}",
                    hint=HINT,
                )
            kind = f"{EIGHT[tensor.info.dtype]}, cast"
            matrix = len(tensor.info.shape) > 1
            found.tensors[name] = _floats(tensor, tensor.info.shape, partial(_cast, tensor, matrix), kind)
            used.add(name)
    for name in (name for name in tensors if name not in used):
        if name.rpartition(".")[2] in (*SCALES, CONFIGURATION, "pre_quant_scale"):
            hint = (
                "diffusers drops the file's header, which may say it: `mxdit quantize` and `mxdit convert` read that."
            )
            raise CheckpointError(
                "nothing in the file says what this scales",
                where=_of(tensors[name]),
                hint=HINT if metadata is not None else hint,
            )
        found.tensors[name] = tensors[name]
    return found


def unprefixed(name: str) -> str:
    """A name without the prefix that the file of a whole checkpoint gives its model."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _configurations(tensors: Mapping[str, Readable], metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Layer -> its configuration: of the header, or in a tensor of its own."""
    texts = {}
    stated = metadata.get("_quantization_metadata")
    if stated is not None:
        layers = _json(stated, f"{where}: _quantization_metadata").get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError("the header's _quantization_metadata lists no layers", where=where, got=brief(layers))
        texts.update({unprefixed(path): said for path, said in layers.items()})
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == CONFIGURATION:
            if tensor.info.dtype is not torch.uint8 or tensor.nbytes > 1 << 12:
                raise CheckpointError("not the text of a layer's configuration", where=_of(tensor), got=tensor.info)
            said = _json(bytes(tensor.read().flatten().tolist()), _of(tensor))
            if texts.setdefault(path, said) != said:
                raise CheckpointError(
                    "the header says another format than the layer", where=_of(tensor), got=brief(said)
                )
    for path, said in texts.items():
        at = f"{where}: {path}"
        method = said.get("format") if isinstance(said, dict) else said
        if not isinstance(said, dict) or not isinstance(method, str) or method not in FORMATS:
            raise CheckpointError(
                "a layer in a format that mxdit does not read",
                where=at,
                got=brief(method),
                expected=", ".join(FORMATS),
                hint=HINT,
            )
        size = {"mxfp8": 32, "nvfp4": 16}.get(method)
        if not said.keys() <= HARMLESS or said.get("group_size", size) != size:
            raise CheckpointError(
                "a layer's configuration says more than mxdit knows the meaning of",
                where=at,
                got=brief(said),
                hint=HINT,
            )
        if f"{path}.weight" not in tensors:
            raise CheckpointError("a configuration of a layer that is not there", where=at, got=brief(said))
    return texts


def _layer(
    found: Decoding, path: str, said: Mapping[str, Any], tensors: Mapping[str, Readable], inside: Callable[[str], bool]
) -> set[str]:
    """Enter a layer that has a configuration; the names of its scales."""
    weight, method = tensors[f"{path}.weight"], said["format"]
    if f"{path}.pre_quant_scale" in tensors:
        raise CheckpointError(
            "a smoothed layer, whose factors its runtime multiplies activations by", where=_of(weight), hint=HINT
        )
    wanted = {"nvfp4": ("weight_scale", "weight_scale_2")}.get(method, ("weight_scale",))
    names = [f"{path}.{leaf}" for leaf in wanted]
    if lacking := [name for name in names if name not in tensors]:
        raise CheckpointError(f"the {method} layer lacks its scales", where=_of(weight), expected=lacking[0], hint=HINT)
    scales = [tensors[name] for name in names]
    if FORMATS[method]:
        found.tensors[f"{path}.weight"] = _scaled(weight, scales[0], FORMATS[method])
    elif method == "nvfp4":
        found.tensors[f"{path}.weight"] = _nvfp4(weight, scales[0], scales[1])
    else:
        n, k = _matrix(weight, torch.float8_e4m3fn)
        if k % 32:
            raise CheckpointError("MXFP8 codes whose last block is not full", where=_of(weight), got=weight.info)
        read = partial(_rows, scales[0], n, _tiled(scales[0], n, k // 32, torch.float8_e8m0fnu))
        if inside(path):
            info, of = TensorInfo((n, k // 32), torch.uint8), scales[0]
            scale = Decoded(of.file, of.name, of.nbytes, info, read, "scales of MXFP8", exact=True)
            found.tensors |= {f"{path}.weight": weight, f"{path}.weight_scale": scale}
            found.methods[path] = "mxfp8"
        else:
            found.tensors[f"{path}.weight"] = _floats(weight, (n, k), partial(_mxfp8, weight, read), "MXFP8")
    return set(names)


# -- what codes mean ---------------------------------------------------------------------------------------------------


def _floats(of: Readable, shape: tuple[int, ...], make: Callable[[], Tensor], kind: str) -> Decoded:
    return Decoded(of.file, of.name, of.nbytes, TensorInfo(shape, torch.float32), make, kind)


def _scaled(weight: Readable, scale: Readable, dtype: torch.dtype | None = None) -> Decoded:
    """FP8 under one scale: codes in FP32 times the scale in FP32, rounded once."""
    dtype = dtype or weight.info.dtype
    if dtype not in EIGHT or weight.info.dtype not in (dtype, torch.uint8):
        expected = EIGHT[dtype] if dtype in EIGHT else " or ".join(EIGHT.values())
        raise CheckpointError(
            "a scaled weight that is not in FP8", where=_of(weight), got=weight.info, expected=expected
        )
    _one(scale)

    def make() -> Tensor:
        return _finite(weight.read().view(dtype).to(torch.float32).mul_(_factor(scale)), weight)

    return _floats(weight, weight.info.shape, make, f"{EIGHT[dtype]}, scaled")


def _cast(tensor: Readable, matrix: bool) -> Tensor:
    """FP8 without a scale, in FP32: the same numbers."""
    codes = tensor.read()
    values = _finite(codes.to(torch.float32), tensor)
    # A weight that was divided by its largest magnitude, or by a power of two near it, fills the range to its upper half.
    # A cast leaves it where it was: no trained matrix of weights reaches that, and one that did would be cut off.
    top = torch.finfo(codes.dtype).max
    if matrix and values.numel() and float(torch.stack(torch.aminmax(values)).abs().max()) > top / 2:
        raise CheckpointError(
            "a weight that fills the range of FP8: it was normalized, and its scale is not in the file",
            where=_of(tensor),
            got=f"magnitudes to {float(values.abs().max()):g}",
            expected=f"at most {top / 2:g} in a file without scales",
            hint=HINT,
        )
    return values


def _nvfp4(weight: Readable, blocks: Readable, scale: Readable) -> Decoded:
    """NVFP4: codes times (FP32 scale of the tensor times E4M3 scale of 16 codes), the product in the parentheses first."""
    n, half = _matrix(weight, torch.uint8)
    tiled = _tiled(blocks, n, half // 8, torch.float8_e4m3fn) if half and half % 8 == 0 else None
    if tiled is None:
        raise CheckpointError("NVFP4 codes whose last block is not full", where=_of(weight), got=weight.info)
    _one(scale)

    def make() -> Tensor:
        codes = weight.read()
        values = unpack((codes << 4) | (codes >> 4)).to(torch.float32)  # theirs has the first of two in the high half
        total = _factor(scale) * _rows(blocks, n, tiled).view(torch.float8_e4m3fn).to(torch.float32)
        values.view(n, -1, 16).mul_(total.unsqueeze(-1))
        return _finite(values, weight)

    return _floats(weight, (n, 2 * half), make, "NVFP4")


def _mxfp8(weight: Readable, scale: Callable[[], Tensor]) -> Tensor:
    return _finite(decode(Packed(weight.read().view(torch.uint8), scale(), None, "mxfp8"), torch.float32), weight)


def _tiled(scale: Readable, n: int, blocks: int, dtype: torch.dtype) -> int:
    """Check scales of (n, blocks) in tiles of 128 rows x 4 columns; the number of blocks of a row."""
    rows, columns = -(-n // 128) * 128, -(-blocks // 4) * 4
    if scale.info.dtype not in (dtype, torch.uint8) or scale.info.shape not in ((rows, columns), (rows * columns,)):
        raise CheckpointError(
            "block scales of another shape or dtype",
            where=_of(scale),
            got=scale.info,
            expected=f"{TensorInfo((rows, columns), dtype)}, in tiles of 128 x 4",
            hint=HINT,
        )
    return blocks


def _rows(scale: Readable, n: int, blocks: int) -> Tensor:
    """(n, blocks) bytes of scales that are stored in tiles.

    Scale (r, c) of a tile of 128 x 4 lies at byte (r % 32) * 16 + r // 32 * 4 + c of its 512, the tiles of a row of them one
    after the other (cuBLAS, "block scaling factors layout").
    """
    tiles = scale.read().view(torch.uint8).view(-(-n // 128), -(-blocks // 4), 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-(-n // 128) * 128, -1)[:n, :blocks].contiguous()


def _matrix(weight: Readable, dtype: torch.dtype) -> tuple[int, int]:
    if len(weight.info.shape) != 2 or weight.info.dtype not in (dtype, torch.uint8):
        raise CheckpointError(
            "misshapen or mistyped codes", where=_of(weight), got=weight.info, expected=f"(N, K) {dtype}"
        )
    return weight.info.shape[0], weight.info.shape[1]


def _one(scale: Readable) -> None:
    if scale.info.dtype not in FLOATS or any(n != 1 for n in scale.info.shape):
        raise CheckpointError(
            "a scale that is not one number", where=_of(scale), got=scale.info, expected="() float32", hint=HINT
        )


def _factor(scale: Readable) -> Tensor:
    value = scale.read().to(torch.float32).view(())
    if not bool(torch.isfinite(value) & (value > 0)):
        raise CheckpointError("a scale that is not finite and positive", where=_of(scale), got=float(value))
    return value


def _finite(values: Tensor, of: Readable) -> Tensor:
    if values.numel() and not all(map(torch.isfinite, torch.aminmax(values))):
        raise CheckpointError(
            "codes that mean infs or NaNs", where=_of(of), hint="The file is damaged: fetch it again."
        )
    return values


def _json(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("no valid JSON", where=where, got=brief(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError("no JSON object", where=where, got=brief(value))
    return value


def _of(tensor: Readable) -> str:
    return f"{tensor.file.name}: {tensor.name}"
