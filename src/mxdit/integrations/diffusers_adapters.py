"""`load_lora_weights`: one adapter for all experts of a pipeline of diffusers (0.40 to 0.42), or for none of them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from mxdit.checkpoint.loras import check_fits
from mxdit.errors import InputError
from mxdit.integrations.lora_files import read_lora
from mxdit.models import COMPONENTS, spec_of, uncompiled
from mxdit.quantize.adapters import unchanged
from mxdit.quantize.loras import PREFIX


def load_lora_weights(pipe: Any, files: Mapping[str, str | PathLike[str]], adapter_name: str) -> None:
    """Load an adapter into transformers of a pipeline, quantized or not: into all that are named, or, on any error, into none.

    Every file is read as `mxdit quantize --lora` reads it, and checked against its model, before the first model is touched:
    what would be lost in one is refused by name. `pipe.set_adapters` then weighs the adapter, `pipe.delete_adapters` takes it
    away: see docs/adapters.md.

        >>> mxdit.load_lora_weights(pipe, {"transformer": "high.safetensors", "transformer_2": "low.safetensors"}, "fast")
        >>> pipe.set_adapters("fast", 0.8)

    Args:
        pipe: a pipeline of diffusers that takes LoRAs.
        files: transformer -> a safetensors file, by names that diffusers knows.
        adapter_name: what it will be called, in all of them.

    Raises:
        InputError: a transformer that the pipeline does not have, or a name that is in use or cannot be one.
        ModelError: a transformer of a family that mxdit does not know.
        CheckpointError: a damaged file, one that is more or less than a LoRA, or does not fit its model.
    """
    models = {component: _model(pipe, component, adapter_name) for component in files}
    if not models:
        raise InputError("nothing to load", field="files", expected=" or ".join(COMPONENTS))
    if not adapter_name or "." in adapter_name:  # it becomes a part of tensors' names
        raise InputError("no name for an adapter", field="adapter_name", got=repr(adapter_name), expected="a word")
    for component, model in models.items():
        check_fits(read_lora(Path(files[component]), spec_of(model)), model)
    with unchanged(pipe):
        for component, model in models.items():
            # `alphas` are of those pipelines that know `return_alphas` (FLUX.1's); others multiply them in.
            state, *alphas, said = pipe.lora_state_dict(
                str(files[component]), return_lora_metadata=True, return_alphas=True
            )
            model.load_lora_adapter(
                state,
                prefix=PREFIX,
                adapter_name=adapter_name,
                network_alphas=(alphas[0] or None) if alphas else None,
                metadata=said or None,
                _pipeline=pipe,
                low_cpu_mem_usage=True,
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
