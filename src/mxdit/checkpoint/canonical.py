"""A component in canonical form, whatever layout it is stored in: what the packed layout holds, and every fault on the way.

Tensors are converted when they are read. Faults that names, shapes, dtypes and the small vectors show are found here; those
that only the data shows are raised when a tensor is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mxdit.checkpoint.checks import as_is, check_dual, check_e4m3, check_mul_scale, check_scale
from mxdit.checkpoint.component import Component, Stored
from mxdit.checkpoint.files import Readable
from mxdit.checkpoint.fitting import misfit, missing, unplaced
from mxdit.checkpoint.layouts.numeric import pack
from mxdit.checkpoint.methods import Reading, methods_of, quantization_of
from mxdit.checkpoint.writer import Part
from mxdit.errors import CheckpointError, FormatError, MXDiTError
from mxdit.models import spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.numerics.formats import FLOATS, PARTS, BlockFormat, TensorInfo, block_format
from mxdit.quantize.tables import table_of

ROTATIONS = ("q_rot", "k_rot")  # of msModelSlim's quantized attention; they cancel in the product of q and k

Convert = Callable[[Tensor, str], Tensor]


def read_component(stored: Stored, base: Stored | None = None, *, fallback: bool = False) -> Component:
    """Bring a stored component into canonical form.

    Args:
        stored: what a layout's reader found.
        base: the same component unquantized; gives the config where `stored` has none, and the tensors that it lacks.
        fallback: take linears of another method than the rest, and smoothed float ones, from `base`.

    Raises CheckpointError where there is no telling what the component is.
    """
    where = str(stored.folder)
    config = stored.config if stored.config is not None or base is None else base.config
    if config is None:
        raise CheckpointError(
            "the layout has no config.json that describes the model",
            where=where,
            hint="Name the unquantized model's directory with --base.",
        )
    most = len(stored.tensors) + len(base.tensors if base else ())
    for key, layers in config.items():  # num_layers, num_single_layers: too many would take for ever to make
        if key.endswith("_layers") and isinstance(layers, int) and layers > most:
            raise CheckpointError(
                "config.json describes another model than the files hold",
                where=where,
                got=f"{key} {layers}",
                expected=f"at most {most}, the number of tensors",
            )
    skeleton = skeleton_of(config, where)
    spec = spec_of(skeleton)
    reading = Reading(stored, base, spec, fallback, dict(stored.tensors))
    linears = {path: module for path, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    methods = methods_of(reading, linears)
    held = skeleton.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in held.items() if name in reading.tensors}
    # A tensor of two names, as the tied embeddings of a T5 have, may be stored under one.
    table = None if stored.quantization is None else table_of(stored.quantization, spec)
    if table is not None:
        held = {n: t for n, t in held.items() if n.rpartition(".")[0] not in spec.tables[1:]}
    wanted = {n: TensorInfo.of(t) for n, t in held.items() if n in reading.tensors or id(t) not in present}
    parts: dict[str, Part] = {}
    for name, want in wanted.items():
        path, _, leaf = name.rpartition(".")
        method = methods.get(path)
        if method and leaf == "weight":
            parts.update(_quantized(reading, path, (want.shape[0], want.shape[1]), block_format(method)))
        elif path == table and stored.quantization is not None:
            row = block_format(str(stored.quantization.embedding))
            parts.update(_quantized(reading, path, (want.shape[0], want.shape[1]), row))
        else:
            parts.update(_float(reading, name, want))
    for pattern in getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ():
        # What transformers passes over, as the decoder of a whole T5, is not the encoder's.
        reading.tensors = {n: t for n, t in reading.tensors.items() if n in held or not re.search(pattern, n)}
    lost = [*stored.lost, *_extra(reading, {*parts, *wanted})]
    _check_sharing(reading, parts, methods)
    quantization = quantization_of(reading, skeleton, methods)
    if table is not None and stored.quantization is not None:
        methods[table] = f"{stored.quantization.embedding} embedding"
    return Component(
        stored, base, spec, config, skeleton, quantization, parts, methods, tuple(reading.faults), tuple(lost)
    )


def _float(reading: Reading, name: str, want: TensorInfo) -> dict[str, Part]:
    stored = reading.tensors.get(name)
    if stored is not None:
        part = Part(stored.info, stored.read)
    else:
        stored = reading.base.tensors.get(name) if reading.base else None
        # A base is often FP32: what is filled in has the dtype of what is there.
        dtype = _dtype(reading) if stored is not None and stored.info.dtype in FLOATS else torch.bfloat16
        part = Part(TensorInfo(want.shape, dtype), partial(_cast, stored, dtype)) if stored is not None else None
    fills = not reading.stored.about  # a single file is whole
    fault = misfit(name, stored.info, want) if stored is not None else missing(name, fills=fills)
    if fault:
        reading.faults.append(fault)
    return {} if fault or part is None else {name: part}


def _cast(stored: Readable, dtype: torch.dtype) -> Tensor:
    return stored.read().to(dtype)


def _dtype(reading: Reading) -> torch.dtype:
    """The dtype that most float tensors of the model itself have."""
    half = (torch.bfloat16, torch.float16)
    dtypes = [t.info.dtype for name, t in reading.tensors.items() if name.rpartition(".")[2] not in PARTS[1:]]
    found = Counter(dtype for dtype in dtypes if dtype is not None and dtype in half)
    return found.most_common(1)[0][0] if found else torch.bfloat16


def _quantized(reading: Reading, path: str, shape: tuple[int, int], row: BlockFormat) -> dict[str, Part]:
    """The parts of a quantized weight (N, K), each converted from the form in which it is stored."""
    stated = reading.stored.quantization
    required = stated is not None and stated.require_smooth_scale
    smooth = f"{path}.mul_scale" in reading.tensors
    if smooth and not row.smooths:
        reading.find(
            f"{path}.mul_scale",
            f"{row.name} is not smoothed: only four-bit weights have a place for the factors",
            hint="Quantize without smoothing, or to four bits. Where other layers are in four bits, --base with the unquantized "
            "model and --fallback-from-base keep these in BF16.",
        )
    smooth = row.smooths and (smooth or required)
    try:
        record = row.tensors(*shape, smooth=smooth, where=path)
    except FormatError as error:
        reading.find(f"{path}.weight", error.what, error.got, error.expected)
        return {}
    parts: dict[str, Part] = {}
    for leaf, info in record.items():
        name = f"{path}.{leaf}"
        stored, forms = reading.tensors.get(name), stored_forms(row, leaf, info)
        if stored is None:
            reading.faults.append(missing(name, row))
        elif stored.info in forms:
            parts[name] = Part(info, partial(_converted, stored, forms[stored.info]))
        else:
            fault = misfit(name, stored.info, next(iter(forms)), row)
            assert fault is not None
            reading.faults.append(fault)
    return parts


def stored_forms(row: BlockFormat, leaf: str, info: TensorInfo) -> dict[TensorInfo, Convert]:
    """The forms in which layouts store a tensor of a linear, its canonical one first, and what makes that of each."""
    shape = info.shape
    if leaf == "weight" and row.bits == 8:
        return {TensorInfo(shape, dtype): check_e4m3 for dtype in (torch.uint8, torch.float8_e4m3fn)}
    if leaf == "weight":
        values = (shape[0], shape[1] * row.per_byte)
        return {info: as_is, **{TensorInfo(values, dtype): pack for dtype in (torch.float8_e4m3fn, *FLOATS)}}
    if leaf == "weight_scale":
        return {TensorInfo(shape, dtype): check_scale for dtype in (torch.uint8, torch.float8_e8m0fnu)}
    if leaf == "weight_dual_scale":
        return {info: check_dual, TensorInfo(shape[:2], torch.float32): check_dual}
    return {TensorInfo(shape, dtype): check_mul_scale for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def _converted(stored: Readable, convert: Convert) -> Tensor:
    return convert(stored.read(), f"{stored.file.name}: {stored.name}")


def _extra(reading: Reading, known: set[str]) -> list[str]:
    """Note what has no place in the model; what is returned has none either, and may be left out."""
    rotations = []
    named = {fault.where for fault in reading.faults}  # these have their fault
    for name in sorted(reading.tensors.keys() - known - named):
        if name.rpartition(".")[2] in ROTATIONS:
            rotations.append(name)
        else:
            reading.faults.append(unplaced(name, reading.tensors[name].info))
    return [f"{len(rotations)} rotations for quantized attention ({rotations[0]}, ...)"] if rotations else []


def _check_sharing(reading: Reading, parts: Mapping[str, Part], methods: Mapping[str, str | None]) -> None:
    """Linears that share an input share its smoothing: runtimes that fuse them have one vector for all."""
    for members in reading.spec.sharing(methods):
        if len({methods[path] for path in members}) > 1:
            got = ", ".join(f"{path} {methods[path] or 'float'}" for path in members)
            reading.find(members[0], "layers that share their input differ in precision", got, "one for all")
            continue
        smooth = [parts[f"{path}.mul_scale"] for path in members if f"{path}.mul_scale" in parts]
        if not smooth:
            continue
        try:
            vectors = [part.read() for part in smooth]
        except MXDiTError:
            continue  # the vector itself is at fault, which reading it says
        if len(vectors) < len(members) or any(not torch.equal(vectors[0], v) for v in vectors[1:]):
            reading.find(
                f"{members[0]}.mul_scale",
                "layers that share their input are smoothed differently",
                ", ".join(members),
                "equal mul_scale in all of them",
            )
