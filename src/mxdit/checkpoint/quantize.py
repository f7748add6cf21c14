"""Quantizing a float checkpoint: what `mxdit quantize` runs. One layer at a time is read, encoded and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.component import Component
from mxdit.checkpoint.files import StoredTensor
from mxdit.checkpoint.loras import Lora, merged
from mxdit.checkpoint.plan import SHARD, CheckpointPlan, ComponentPlan
from mxdit.checkpoint.sources import open_both, rest_of
from mxdit.checkpoint.writer import ENCODER_STEM, STEM, Part, check_destination, shards_of
from mxdit.config import ConfigLike, MXConfig
from mxdit.config.encoders import stated
from mxdit.errors import CheckpointError, ConfigError, FormatError, InputError
from mxdit.models import TEXT_ENCODERS
from mxdit.models.encoders import PLAIN
from mxdit.numerics.formats import FLOATS, PARTS, TensorInfo, block_format
from mxdit.quantize.plan import plan
from mxdit.quantize.tables import table_of
from mxdit.version import __version__
from mxdit.weights import quantize_weight


def quantize_checkpoint(
    source: Path | Mapping[str, Path],
    destination: Path,
    config: ConfigLike,
    overrides: Mapping[str, ConfigLike | None] | None = None,
    *,
    base: Path | None = None,
    calibrated: Mapping[str, Mapping[str, StoredTensor]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    shard_size: int = SHARD,
    variant: str | None = None,
    beside: Mapping[str, Path] | None = None,
    loras: Mapping[str, Sequence[tuple[Lora, float]]] | None = None,
    encoders: Mapping[str, MXConfig] | None = None,
) -> CheckpointPlan:
    """Plan the packed checkpoint of a float one; `.write()` carries it out.

    Args:
        source: a BF16, FP16 or FP32 checkpoint in diffusers or the original layout: a pipeline, a cascade, or one component.
            Or single files, whose FP8, NVFP4 and GGUF weights are decoded: one, or component -> file.
        destination: a directory that does not exist.
        config: how every component is quantized.
        overrides: component -> its own config, or None to keep it in `dtype`.
        base: a directory for what `source` lacks beside the weights: config.json of single files, and text encoder, VAE and the
            rest of a pipeline.
        calibrated: component -> name -> a tensor that is written in place of what would be made: those of a linear's record
            all or none, and floats that go with them. What a config leaves in `dtype` is not replaced.
        dtype: of what is not quantized; weights are cast to it before they are quantized, as an online load does.
        device: where weights are quantized, one at a time. What is written is canonical on every device.
        shard_size: most bytes of a file.
        variant: of the source's weight files, as diffusers' `variant=`; None takes the plain ones, or the one that there is.
        beside: name in the destination -> a file that is put there, too.
        loras: component -> (LoRA, scale) of each that is merged into its weights, in FP32 and in this order, before they are
            cast to `dtype`; `integrations.lora_files.read_lora` reads them. config.json says so.
        encoders: text encoder -> how it is quantized; others are carried over as they are.

    Raises InputError, ConfigError and CheckpointError for what cannot be done, before anything is written.
    """
    if dtype not in FLOATS:
        raise InputError("no dtype of a model", where="dtype", got=dtype, expected=" or ".join(map(str, FLOATS)))
    check_destination(destination)
    opened, under = open_both(source, base, variant)
    own = dict(overrides or {})
    unknown = [name for name in own if name not in opened.components]
    if unknown:
        raise ConfigError(
            "a config for a component that the checkpoint does not have",
            where=str(opened.path),
            got=unknown[0],
            expected=" or ".join(opened.components) or "none, the checkpoint is one component",
        )
    encoders = encoders or {}
    if own and not encoders and all(own.get(name, config) is None for name in opened.components):
        raise ConfigError("every component is left unquantized", where=str(opened.path))
    rest = opened if opened.pipeline or under is None else under
    for name in encoders:
        if name not in rest.encoders:
            raise ConfigError(
                "no text encoder that mxdit packs",
                where=str(rest.path / name),
                expected=f"one of {', '.join(rest.encoders)}" if rest.encoders else " or ".join(PLAIN),
                hint="Others are quantized while they load: mxdit.pipeline_config(..., text_encoder=...), then "
                "save_pretrained.",
            )
    _check_loras(loras or {}, opened.components, calibrated)
    planned = []
    for name in (*opened.components, *encoders):
        component = read_component((rest if name in encoders else opened).read(name))
        if component.quantization is not None or any(component.methods.values()):
            raise CheckpointError(
                "the checkpoint is quantized already",
                where=str(component.stored.folder),
                got=component.stored.layout,
                expected="a BF16, FP16 or FP32 checkpoint",
                hint="mxdit convert changes its layout.",
            )
        component.require_sound()
        given = (loras or {}).get(name, ())
        if given:
            component = merged(component, given)
        chosen = encoders[name] if name in encoders else own.get(name, config)
        made = _planned(
            name,
            component,
            None if chosen is None else MXConfig.of(chosen),
            (calibrated or {}).get(name, {}),
            dtype,
            device,
            shard_size,
        )
        planned.append(replace(made, reads=(*made.reads, *(lora.file for lora, _ in given))))
    carried, files = rest_of(rest, encoders)
    return CheckpointPlan(opened.path, destination, planned, {**carried, **(beside or {})}, files, device=device)


def _check_loras(
    loras: Mapping[str, object], components: Mapping[str, Path], calibrated: Mapping[str, object] | None
) -> None:
    """Raise InputError for a LoRA without its component, and one that calibrated weights would be without."""
    for name in loras:
        if name not in components:
            raise InputError(
                "a LoRA for a component that the checkpoint does not have",
                field="lora",
                got=name,
                expected=" or ".join(filter(None, components)) or "none, the checkpoint is one component",
            )
        if calibrated and name in calibrated:
            raise InputError(
                "a LoRA beside calibrated weights, which are without it",
                field="lora",
                got=name,
                hint="Merge it first: mxdit calibrate takes the model that has it.",
            )


def _planned(
    name: str,
    component: Component,
    config: MXConfig | None,
    calibrated: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: str,
    shard_size: int,
) -> ComponentPlan:
    written = {key: value for key, value in component.config.items() if key != "quantization_config"}
    methods: dict[str, str | None] = dict.fromkeys(component.methods)
    if config is not None:
        if config.is_checkpoint_serialized:
            raise ConfigError("the config is one of a serialized checkpoint", where=name or "quantize")
        decisions = plan(component.skeleton, config)
        methods = {path: decision.method for path, decision in decisions.items()}
        serialized = config.serialized(methods, {"mxdit": __version__})
        encoder = component.spec.components == TEXT_ENCODERS
        written["quantization_config"] = stated(serialized) if encoder else serialized.to_dict()
        if encoder:
            key = "torch_dtype" if "torch_dtype" in written else "dtype"  # 4.55 and older, and newer
            written[key] = str(dtype).removeprefix("torch.")
    parts: dict[str, Part] = {}
    table = None if config is None else table_of(config, component.spec)
    if table is not None and config is not None:
        methods[table] = f"{config.embedding} embedding"
    for tensor, part in component.parts.items():
        path, _, leaf = tensor.rpartition(".")
        if table is not None and config is not None and path in component.spec.tables:
            if path == table or f"{table}.weight" not in component.parts:
                packed = MXConfig(str(config.embedding))
                of = str(packed.quant_method)
                parts.update(_quantized(table, part, of, packed.rule_of(of), dtype, device))
            continue
        method = methods.get(path)
        if config is not None and method and leaf == "weight":
            made = _calibrated(path, calibrated)
            parts.update(made or _quantized(path, part, method, config.rule_of(method), dtype, device))
        elif method and tensor in calibrated:
            own = calibrated[tensor]
            parts[tensor] = Part(TensorInfo(own.shape, dtype), partial(_kept, Part(own.info, own.read), dtype, tensor))
        else:
            parts[tensor] = Part(TensorInfo(part.info.shape, dtype), partial(_kept, part, dtype, tensor))
    stem = ENCODER_STEM if component.spec.components == TEXT_ENCODERS else STEM
    return ComponentPlan(name, written, shards_of(parts, shard_size, stem), {}, methods, component.reads, stem)


def _calibrated(path: str, calibrated: Mapping[str, StoredTensor]) -> dict[str, Part]:
    """The parts of a linear that was calibrated; none of another one."""
    names = [name for leaf in PARTS if (name := f"{path}.{leaf}") in calibrated]
    return {name: Part(calibrated[name].info, calibrated[name].read) for name in names}


def _quantized(
    path: str, weight: Part, method: str, rule: str | None, dtype: torch.dtype, device: str
) -> dict[str, Part]:
    """The parts of a quantized linear. Its weight is encoded once, when the first of them is read."""
    waiting: dict[str, Tensor] = {}

    def read(leaf: str) -> Tensor:
        if leaf not in waiting:
            try:
                made = quantize_weight(weight.read().to(dtype).to(device), method, rule=rule)
            except FormatError as error:
                raise CheckpointError(
                    error.what, where=f"{path}.weight", got=error.got, expected=error.expected, hint=error.hint
                ) from error
            waiting.update({name: tensor.cpu() for name, tensor in made.items()})
        return waiting.pop(leaf)

    record = block_format(method).tensors(*weight.info.shape, where=path)
    return {f"{path}.{leaf}": Part(info, partial(read, leaf)) for leaf, info in record.items()}


def _kept(part: Part, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor that stays float, in `dtype`. Raises CheckpointError where it is not finite there."""
    tensor = part.read().to(dtype)
    if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise CheckpointError(
            "the tensor holds infs or NaNs",
            where=name,
            expected=f"numbers that {str(dtype).removeprefix('torch.')} has",
            hint="The checkpoint is damaged, or overflows in this dtype: take it in BF16 or FP32.",
        )
    return tensor
