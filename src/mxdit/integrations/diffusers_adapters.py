"""`load_lora_weights`: one adapter for all experts of a pipeline of diffusers (0.40 to 0.42), or for none of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mxdit.checkpoint.files import read_header
from mxdit.errors import CheckpointError, InputError, ModelError
from mxdit.models import COMPONENTS, uncompiled
from mxdit.models.skeleton import UNBUILDABLE
from mxdit.quantize.adapters import PREFIX, check_lora, named, unchanged

logger = logging.getLogger(__name__)
Source = str | PathLike[str] | Mapping[str, Tensor]


def load_lora_weights(pipe: Any, files: Mapping[str, Source], adapter_name: str) -> None:
    """Load an adapter into transformers of a pipeline, quantized or not: into all that are named, or, on any error, into none.

    Files are read by diffusers' own converters (PEFT's, diffusers', ComfyUI's, Kohya's, Lightning's names), and checked against
    every model before the first is touched. `pipe.set_adapters` then weighs the adapter, `pipe.delete_adapters` takes it away:
    see docs/adapters.md.

        >>> mxdit.load_lora_weights(pipe, {"transformer": "high.safetensors", "transformer_2": "low.safetensors"}, "fast")
        >>> pipe.set_adapters("fast", 0.8)

    Args:
        pipe: a pipeline of diffusers that takes LoRAs.
        files: transformer -> a safetensors file, or the tensors of one by name.
        adapter_name: what it will be called, in all of them.

    Raises:
        InputError: a transformer that the pipeline does not have, or a name that is in use or cannot be one.
        CheckpointError: a damaged file, or one whose names no converter knows.
        ModelError: a file that does not fit its model, or is more than a LoRA.
    """
    models = {component: _model(pipe, component, adapter_name) for component in files}
    if not models:
        raise InputError("nothing to load", field="files", expected=" or ".join(COMPONENTS))
    if not adapter_name or "." in adapter_name:  # it becomes a part of tensors' names
        raise InputError("no name for an adapter", field="adapter_name", got=repr(adapter_name), expected="a word")
    loads = {}
    for component, source in files.items():
        where = f"{component}, {'the tensors' if isinstance(source, Mapping) else source}"
        state, alphas, metadata = _read(pipe, source, where)
        check_lora(models[component], named(state, PREFIX), where)
        loads[component] = state, {"network_alphas": alphas or None, "metadata": metadata or None}
    with unchanged(pipe):
        for component, (state, said) in loads.items():
            models[component].load_lora_adapter(
                state, prefix=PREFIX, adapter_name=adapter_name, _pipeline=pipe, low_cpu_mem_usage=True, **said
            )


def _model(pipe: Any, component: str, adapter_name: str) -> Any:
    model = uncompiled(getattr(pipe, component, None) or nn.Identity())
    if component not in COMPONENTS or not hasattr(model, "load_lora_adapter") or not hasattr(pipe, "lora_state_dict"):
        raise InputError(
            "no such transformer in the pipeline, or none that takes a LoRA",
            field="files",
            got=repr(component),
            expected=" or ".join(name for name in COMPONENTS if getattr(pipe, name, None) is not None),
        )
    if adapter_name in getattr(model, "peft_config", {}):
        raise InputError(
            "the name is in use",
            field="adapter_name",
            where=component,
            got=repr(adapter_name),
            hint="delete_adapters() it.",
        )
    return model


def _read(pipe: Any, source: Source, where: str) -> tuple[dict[str, Tensor], Mapping[str, Any], Mapping[str, Any]]:
    """(tensors by diffusers' names, alphas, what the file says of itself) of an adapter."""
    names = source if isinstance(source, Mapping) else read_header(Path(source))
    if scales := [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]:
        raise ModelError(  # diffusers would leave out what makes it one, and load the rest
            "a DoRA cannot be beside quantized linears",
            where=where,
            got=scales[0],
            expected="a plain LoRA",
            hint="Use it on the model in BF16.",
        )
    if left := [name for name in names if name.endswith(".diff") and "head" not in name]:
        logger.warning("%s: diffusers leaves out %d tensors that are no LoRA's, such as %s", where, len(left), left[0])
    try:
        state, *more = pipe.lora_state_dict(
            dict(source) if isinstance(source, Mapping) else str(source),
            return_lora_metadata=True,
            **({"return_alphas": True} if _has_alphas(pipe) else {}),
        )
    except (*UNBUILDABLE, NameError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError("diffusers knows no adapter with such tensors", where=where, got=said) from error
    alphas, metadata = more if len(more) == 2 else (None, *more)
    return state, alphas or {}, metadata or {}


def _has_alphas(pipe: Any) -> bool:
    """Whether the converter gives alphas beside the tensors (FLUX.1's does); others multiply them in."""
    from diffusers.loaders import FluxLoraLoaderMixin

    return isinstance(pipe, FluxLoraLoaderMixin)
