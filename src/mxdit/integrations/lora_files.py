"""Files of a LoRA, by the names that diffusers knows: its own, PEFT's, and those that its pipelines convert (ComfyUI's, Kohya's,
a release's own).

diffusers' public converter of the family's pipeline (`lora_state_dict`) says what a file means. It passes over what it does not
know, in silence or with a warning; here everything in a file has a place, or the file is refused. And it is run on tensors that
are not read yet, so that a LoRA of gigabytes is merged a layer at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mxdit.checkpoint.files import StoredTensor, brief, read_header
from mxdit.checkpoint.loras import Lora, LoraLayer
from mxdit.checkpoint.writer import Part
from mxdit.errors import CheckpointError, InputError
from mxdit.models import ModelSpec
from mxdit.models.skeleton import UNBUILDABLE
from mxdit.numerics.formats import FLOATS, TensorInfo
from mxdit.quantize.loras import BIAS, DOWN, UP, check_config, layers_of, named

METADATA = "lora_adapter_metadata"  # in the header of a file that diffusers wrote: the LoraConfig of peft, as JSON
UNCONVERTIBLE = (*UNBUILDABLE, NameError)  # what a converter raises for names or shapes that it did not expect


def read_lora(file: Path, spec: ModelSpec) -> Lora:
    """What a LoRA's file changes in a transformer of this family. Its matrices are read when they are asked for.

    Args:
        file: .safetensors.
        spec: the family whose names it has.

    Raises:
        InputError: diffusers has no LoRA for this family.
        CheckpointError: a damaged file, one that diffusers cannot convert, or one that holds what has no place: the error names
            it. Whether the linears exist is `mxdit.checkpoint.loras.check_fits`'s to say.
    """
    import diffusers

    classes = (getattr(diffusers, name, None) for name in spec.pipelines)
    pipeline: Any = next((cls for cls in classes if hasattr(cls, "lora_state_dict")), None)
    if pipeline is None:
        raise InputError("diffusers has no LoRA for this family", field="lora", got=spec.transformer)
    stored = read_header(file)
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    _check_data(file, stored)
    used: set[str] = set()
    try:
        found = pipeline.lora_state_dict(
            {name: _Deferred.of(tensor, used) for name, tensor in stored.items()},
            return_lora_metadata=True,
            return_alphas=True,
        )
        state, *alphas, _ = found  # alphas are of those pipelines that know `return_alphas`
        tensors = _checked(file, state, pipeline.transformer_name)
    except UNCONVERTIBLE as error:
        raise CheckpointError(
            f"diffusers' {pipeline.__name__} cannot convert the file",
            where=str(file),
            got=brief(error),
            expected="a LoRA by names that it knows",
            hint="Is it one for another model, or no LoRA?",
        ) from None
    for tensor in state.values():
        used |= getattr(tensor, "sources", frozenset())
    lost = [name for name in stored if name not in used and name not in (alphas[0] or {} if alphas else {})]
    for name in lost:
        if stored[name].read().count_nonzero():  # zeros would have changed nothing
            dora = "dora" in name or "magnitude" in name
            raise CheckpointError(
                "a DoRA, whose magnitudes diffusers drops" if dora else "diffusers drops this tensor of the LoRA",
                where=f"{file}: {name}",
                hint=None if dora else "What it holds would be lost: it is in no form that diffusers loads.",
            )
    scaling = _scalings(file, pipeline.transformer_name, alphas[0] if alphas else None)
    layers = {path: _layer(of, scaling(path, of[DOWN].shape[0])) for path, of in layers_of(tensors, str(file)).items()}
    return Lora(file, digest, layers)


def _check_data(file: Path, stored: Mapping[str, StoredTensor]) -> None:
    for name, tensor in stored.items():
        if tensor.info.dtype not in FLOATS and tensor.shape not in ((), (1,)):
            raise CheckpointError(
                "a dtype that no LoRA has", where=f"{file}: {name}", got=tensor.code, expected="BF16, FP16 or FP32"
            )
        data = tensor.read()
        if data.numel() and not torch.isfinite(data).all():
            raise CheckpointError("the LoRA holds infs or NaNs", where=f"{file}: {name}", hint="The file is damaged.")


def _checked(file: Path, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors of the transformer, by peft's names of them, without the prefix."""
    if not state:
        raise CheckpointError("the file holds no LoRA", where=str(file))
    foreign = next((name for name in state if not name.startswith(f"{prefix}.")), None)
    if foreign is not None:
        raise CheckpointError(
            "a tensor that is not the transformer's",
            where=f"{file}: {foreign}",
            expected=f"names that begin with {prefix}., diffusion_model. or what else diffusers converts to that",
            hint="`save_lora_weights` of the pipeline writes such names; of other models than the transformer nothing is taken.",
        )
    return named(state, prefix)


def _layer(parts: Mapping[str, Any], scaling: float) -> LoraLayer:
    of = {leaf: Part(TensorInfo(tuple(tensor.shape), tensor.dtype), _reader(tensor)) for leaf, tensor in parts.items()}
    return LoraLayer(of[DOWN], of[UP], scaling, of.get(BIAS))


def _scalings(file: Path, prefix: str, alphas: Mapping[str, Any] | None) -> Callable[[str, int], float]:
    """What says of each layer, given its path and rank, by how much the file itself scales it, as peft would.

    That is alpha / rank with the alphas that a pipeline's converter gives, or else by the config of peft in the file's header.
    """
    with safe_open(str(file), "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    try:
        told = json.loads(text) if text else {}
        config = {key.removeprefix(f"{prefix}."): value for key, value in told.items() if key.startswith(f"{prefix}.")}
    except (ValueError, AttributeError) as error:
        raise CheckpointError("the header's config of the LoRA is no JSON", where=str(file), got=brief(error)) from None
    check_config(config, f"{file}: {METADATA}")
    if config and alphas:
        raise CheckpointError(
            "the LoRA says twice how strong it is", where=f"{file}: {METADATA}", got="alphas beside it"
        )

    def scaling(path: str, rank: int) -> float:
        if alphas:
            alpha, stated = alphas.get(f"{prefix}.{path}.alpha"), rank
        elif config:
            alpha = _matching(config.get("alpha_pattern"), path, config.get("lora_alpha"))
            stated = _matching(config.get("rank_pattern"), path, config.get("r"))
        else:
            return 1.0
        value = math.nan if alpha is None else float(alpha)
        if stated != rank or not math.isfinite(value):
            raise CheckpointError(
                "the LoRA does not say how strong this layer is",
                where=f"{file}: {path}",
                got=f"alpha {alpha}, rank {stated}",
                expected=f"an alpha, and the rank {rank} of its matrices",
            )
        return value / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scaling


def _matching(patterns: Any, path: str, default: Any) -> Any:
    """peft's choice: the first pattern that the end of the path matches."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, default)


def _reader(tensor: Any) -> Callable[[], Tensor]:
    return tensor.read if isinstance(tensor, _Deferred) else lambda: tensor


class _Deferred(Tensor):
    """A tensor of a file that is not read yet, or what torch would make of such: on the meta device, with a way to make it.

    read     makes it.
    sources  the names of the file's tensors that it is made of.
    """

    read: Callable[[], Tensor]
    sources: frozenset[str]
    used: set[str]

    @staticmethod
    def of(stored: StoredTensor, used: set[str]) -> Tensor:
        return _deferred(
            torch.empty(stored.shape, dtype=stored.info.dtype, device="meta"), stored.read, {stored.name}, used
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]  # where it is once it is read
            return torch.device("cpu")
        later = [tensor for tensor in _leaves([*args, *kwargs.values()]) if isinstance(tensor, _Deferred)]
        sources, used = {name for tensor in later for name in tensor.sources}, later[0].used
        if func.__name__ == "__setitem__":
            raise NotImplementedError("a part of a tensor that is not read is written to")
        # As it is now: `a *= b` makes another tensor of `a`, and what was made of it before stays.
        given, options = _each(args, _copied), _each(kwargs, _copied)

        def really() -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*_each(given, _read), **_each(options, _read))

        try:
            with torch._C.DisableTorchFunctionSubclass():
                made = func(*_each(args, _meta), **_each(kwargs, _meta))
        except (RuntimeError, NotImplementedError):  # a value is asked for, as an alpha's
            used |= sources
            return really()
        if isinstance(made, Tensor):
            return _deferred(made, really, sources, used, args[0] if func.__name__.endswith("_") else None)
        if isinstance(made, list | tuple) and any(isinstance(one, Tensor) for one in made):
            return tuple(_deferred(one, lambda i=i: really()[i], sources, used) for i, one in enumerate(made))
        return made


def _deferred(meta: Tensor, read: Callable[[], Tensor], sources: set[str], used: set[str], into: Any = None) -> Tensor:
    """`into`, or a tensor of its own, that is made so."""
    tensor: Any = meta.as_subclass(_Deferred) if into is None else into
    tensor.read, tensor.sources, tensor.used = read, frozenset(sources), used
    return tensor


def _copied(tensor: Tensor) -> Tensor:
    return (
        _deferred(_meta(tensor), tensor.read, {*tensor.sources}, tensor.used)
        if isinstance(tensor, _Deferred)
        else tensor
    )


def _read(tensor: Tensor) -> Tensor:
    return tensor.read() if isinstance(tensor, _Deferred) else tensor


def _meta(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, _Deferred) else tensor.to("meta")


def _each(value: Any, do: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `do` done to each tensor in it."""
    if isinstance(value, Tensor):
        return do(value)
    if isinstance(value, dict):
        return {key: _each(one, do) for key, one in value.items()}
    return type(value)(_each(one, do) for one in value) if type(value) in (list, tuple) else value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
