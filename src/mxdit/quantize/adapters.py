"""Adapters (LoRA) beside quantized linears: what of diffusers' and peft's calls a quantized model answers differently.

peft wraps an `MXLinear` as it wraps any `nn.Linear`: its product is computed as ever, and the adapter's, in floats on the
unquantized input, is added. What is left to see to is what would touch the packed weight, and what a load that fails leaves
behind: diffusers leaves empty tuner layers in the model, and where one cannot be wrapped, adapters of uninitialized memory that
are active.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from mxdit.errors import CheckpointError, ModelError
from mxdit.layers import MXLinear
from mxdit.quantize.loras import PREFIX, check_config, check_layers, layers_of, named
from mxdit.weights import NOT_FUSED


class AdaptersBeside:
    """The methods of diffusers' `PeftAdapterMixin` that a quantized model has of its own (`beside`)."""

    def load_lora_adapter(
        self: Any,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = PREFIX,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """diffusers' own, all or nothing: a file that does not fit is refused, and whatever fails leaves the model as it was.

        The adapter is kept in the model's float dtype.

        Raises CheckpointError for tensors that do not fit the model, hold NaN or inf, or make another adapter than a LoRA, and
        what diffusers raises.
        """
        with unchanged(self, kwargs.get("_pipeline"), hotswap=hotswap):
            source, where = pretrained_model_name_or_path_or_dict, "load_lora_adapter"
            if isinstance(source, Mapping):
                check_layers(layers_of(named(source, prefix), where), self, where)
            check_config(named(kwargs.get("metadata") or {}, prefix), where, _usual())
            before = set() if hotswap else set(getattr(self, "peft_config", {}))
            cast(Any, super()).load_lora_adapter(source, prefix=prefix, hotswap=hotswap, **kwargs)
            for name in set(getattr(self, "peft_config", {})) - before:
                _settle(self, name, self.dtype)

    def add_adapter(self: Any, adapter_config: Any, adapter_name: str = "default") -> None:
        """diffusers' own, for a plain LoRA, whose weights peft makes in FP32. Raises CheckpointError for anything else."""
        with unchanged(self):
            check_config(getattr(adapter_config, "to_dict", dict)(), "add_adapter", _usual())
            cast(Any, super()).add_adapter(adapter_config, adapter_name)
            _settle(self, adapter_name, None)

    def fuse_lora(self: Any, *args: Any, **kwargs: Any) -> None:
        """Refused where an adapter is beside a packed weight, which cannot take it up; nothing is changed then."""
        for path, layer in tuners(self):
            if isinstance(layer.get_base_layer(), MXLinear):
                raise ModelError("an adapter cannot be fused into a packed weight", where=path, hint=NOT_FUSED)
        cast(Any, super()).fuse_lora(*args, **kwargs)

    def delete_adapters(self: Any, adapter_names: list[str] | str) -> None:
        """diffusers' own; with the last adapter, peft's layers go as well, and the model is what it was before the first."""
        cast(Any, super()).delete_adapters(adapter_names)
        if not getattr(self, "peft_config", None):
            self.unload_lora()

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, (_, *rest), *state = super().__reduce_ex__(protocol)
        return _again, (make, type(self).__mro__[2], rest), *state  # a class that is made cannot be found by its name


def beside(model: nn.Module) -> None:
    """Let a quantized diffusers model answer adapters' calls as `AdaptersBeside` says: its class gets that in front.

    The class keeps its name, module and everything else. A model that takes no adapters is left alone.
    """
    if hasattr(model, "load_lora_adapter") and not isinstance(model, AdaptersBeside):
        model.__class__ = _class_beside(type(model))


@cache
def _class_beside(cls: type) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (AdaptersBeside, cls), names)


def _again(make: Any, cls: type, rest: list[Any]) -> Any:
    return make(_class_beside(cls), *rest)


@contextmanager
def unchanged(*models: Any, hotswap: bool = False) -> Iterator[None]:
    """Give models back as they were if the block raises: modules, hooks, adapters and their bits, and what is trained.

    Args:
        models: modules, pipelines with their components, or None.
        hotswap: whether the block writes into the tensors of adapters that are there. They are copied then, to the CPU.
    """
    roots = [part for model in models for part in getattr(model, "components", {"": model}).values()]
    modules = list({id(m): m for root in roots if isinstance(root, nn.Module) for m in root.modules()}.values())
    names = [(vars(module), dict(vars(module))) for module in modules]
    inside = [
        (held, copy(held)) for _, before in names for held in before.values() if type(held) in (dict, OrderedDict, list)
    ]
    wanting = [(tensor, tensor.requires_grad) for module in modules for tensor in module.parameters(recurse=False)]
    bits = [
        (tensor, tensor.detach().cpu().clone() if hotswap else tensor.data)
        for module in modules
        for tensor in _tensors_of_adapters(module)
    ]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for now, before in names:
                now.clear()
                now.update(before)
            for now, before in inside:
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
            for tensor, wanted in wanting:
                tensor.requires_grad_(wanted)
            for tensor, before in bits:
                tensor.data = before.to(tensor.device)


def _usual() -> dict[str, Any]:
    from peft import LoraConfig

    return LoraConfig().to_dict()


def _settle(model: nn.Module, name: str, dtype: torch.dtype | None) -> None:
    """Check an adapter that has come to be. Beside quantized linears it is cast to `dtype`, and added in one pass."""
    from peft.tuners.lora import Linear

    from mxdit.quantize.one_pass import OnePass

    for path, layer in tuners(model):
        packed = isinstance(layer.get_base_layer(), MXLinear)
        kind = getattr(layer, "lora_variant", {}).get(name, layer)
        if packed and type(kind) not in (Linear, OnePass):
            raise CheckpointError(
                "an adapter that cannot be beside a quantized linear",
                where=path,
                got=type(kind).__name__,
                expected="a plain LoRA",
            )
        for part, holder in _adapters_of(layer):
            if part != name:
                continue
            for tensor in holder.parameters():
                if tensor.is_meta or not torch.isfinite(tensor).all():
                    what = "a part of the LoRA was not loaded" if tensor.is_meta else "the LoRA holds infs or NaNs"
                    raise CheckpointError(what, where=path)
            if dtype is not None and packed:
                holder.to(dtype)
        if packed and name in layer.lora_A:
            layer.lora_variant[name] = OnePass()


def tuners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of peft's layers in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def _adapters_of(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, module with its tensors) of the adapters in a layer of peft."""
    for held in layer.adapter_layer_names:
        if isinstance(holders := getattr(layer, held, None), nn.ModuleDict):
            yield from holders.items()


def _tensors_of_adapters(module: Any) -> Iterator[Tensor]:
    if hasattr(module, "adapter_layer_names"):
        for _, holder in _adapters_of(module):
            yield from holder.parameters()
