"""What a model in memory must be before it is quantized (the modules that its config makes, with their weights in place), and
what it may be given afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from mxdit.errors import ModelError
from mxdit.models.skeleton import skeleton_like
from mxdit.numerics.formats import FLOATS
from mxdit.packed import PackedModule

# Part of a module's path that gives away what was done to a model -> what that is, and what undoes it.
CHANGES = {
    "base_layer": (
        "adapters",
        "call unload_lora_weights() of the pipeline (unload_lora() of the model), after fuse_lora() if their effect is to stay "
        "(which a model in BF16 can do, and a quantized one cannot)",
    ),
    **dict.fromkeys(
        ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv"),
        ("fused projections", "call unfuse_qkv_projections()"),
    ),
    "_orig_mod": ("compiled parts", "put their _orig_mod back in their place"),
    "parametrizations": ("parametrized weights", "call torch.nn.utils.parametrize.remove_parametrizations"),
}
# Hooks that keep a module's weights elsewhere, or in another form than it computes with -> the right order. diffusers and
# accelerate have one class of the second name each.
HOOKS = {
    "GroupOffloadingHook": "Load the model anew, quantize it, then call enable_group_offload().",
    "LayerwiseCastingHook": "Load the model anew and quantize it instead: its weights are already rounded for storage.",
    "AlignDevicesHook": "Quantize first, then offload. accelerate.hooks.remove_hook_from_submodules(model), or "
    "remove_all_hooks() of the pipeline, brings back weights that were loaded before they were offloaded.",
}


def remedy(names: Iterable[str], act: str) -> str:
    """What to call before one acts ("quantizing"), told from modules or tensors that a config does not make; "" if unknown."""
    parts = {part for name in names for part in name.split(".")}
    known = next((change for part, change in CHANGES.items() if part in parts), None)
    return f"It has {known[0]}: before {act}, {known[1]}." if known else ""


def check_modules(model: nn.Module) -> None:
    """Raise ModelError unless `model` has the modules and tensors that its own config makes: others could not be reloaded.

    A module may be of a subclass that computes the same. A model without a config, which no checkpoint describes, passes.
    """
    skeleton = skeleton_like(model)
    if skeleton is None:
        return
    where, made, found = type(model).__name__, dict(skeleton.named_modules()), dict(model.named_modules())
    extra = [path for path in found if path not in made]
    missing = [path for path in made if path not in found]
    hint = remedy(extra, "quantizing") or "Quantize it as from_pretrained gives it, and change it afterwards."
    if extra or missing:
        raise ModelError(
            "the model's modules are not those that its config makes",
            where=where,
            got=f"{_some(extra)} besides" if extra else f"no {_some(missing)}",
            hint=hint,
        )
    for path, module in found.items():
        if not isinstance(module, type(made[path])) or type(module).forward is not type(made[path]).forward:
            raise ModelError(
                "a module is not the one that the model's config makes",
                where=path,
                got=f"{type(module).__module__}.{type(module).__name__}",
                expected=type(made[path]).__name__,
                hint=hint,
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    present = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in (*shapes, *present):
        if shapes.get(name) != present.get(name):
            raise ModelError(
                "a tensor is not the one that the model's config makes",
                where=name,
                got=present.get(name, "none"),
                expected=shapes.get(name, "none"),
                hint=hint,
            )


def check_weights(model: nn.Module) -> None:
    """Raise ModelError unless every tensor of `model` is in memory, and the weight of every linear a plain float tensor.

    Hooks are told by their class: the tensors that they leave behind may look like any other, and hold anything.
    """
    for path, module in model.named_modules():
        for hook in _hooks(module):
            name = type(hook).__name__
            if name in HOOKS and getattr(hook, "offload", True):
                raise ModelError(
                    "a hook keeps the weights elsewhere, or in another form",
                    where=path or type(model).__name__,
                    got=name,
                    hint=HOOKS[name],
                )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                "the weight is not loaded",
                where=name,
                got="a tensor on the meta device",
                hint="Load the model's weights first, or quantize while loading: from_pretrained(quantization_config=...).",
            )
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _check_weight(module.weight, f"{path}.weight")
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
                raise ModelError(
                    "the linear has a hook that would be lost",
                    where=path,
                    got=type(hook).__name__,
                    hint="Remove it: another layer takes the linear's place.",
                )


def check_state(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """A pre-hook of `load_state_dict`: refuse what a quantized layer could not take before any tensor of the model is copied.

    Each layer checks for itself as well, but torch comes to it when those before it have been overwritten.
    """
    for path, module in model.named_modules(remove_duplicate=False):  # tied embeddings have several names
        if isinstance(module, PackedModule):
            module.check_state(state, f"{prefix}{path}.")


def _check_weight(weight: Tensor, where: str) -> None:
    if hasattr(
        weight, "__tensor_flatten__"
    ):  # as torch tells a tensor that is made of others; a device may have a class
        raise ModelError(
            "the weight is not a plain tensor",
            where=where,
            got=type(weight).__name__,
            hint="Another library sharded or quantized the model: quantize it before sharding, from weights in BF16.",
        )
    if weight.dtype not in FLOATS:
        raise ModelError(
            "the weight is not encoded from this dtype",
            where=where,
            got=f"a {type(weight).__name__} of {weight.dtype}",
            expected=" or ".join(map(str, FLOATS)),
            hint="Cast the model to torch.bfloat16. If another library quantized it (GGUF, bitsandbytes), load its BF16 release.",
        )
    if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
        raise ModelError(
            "the weight's memory is not there",
            where=where,
            got=f"{weight.untyped_storage().nbytes()} bytes",
            expected=weight.numel() * weight.element_size(),
            hint="A sharding library freed it: gather the model, or quantize before sharding.",
        )


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks that diffusers and accelerate have put on a module, a chain's members each."""
    registry: Mapping[str, Any] = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    yield from registry.values()
    chained = [getattr(module, "_hf_hook", None)]
    while chained:
        hook = chained.pop(0)
        if hook is not None:
            yield hook
            chained.extend(getattr(hook, "hooks", ()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
