"""What a model in memory must be before it is quantized: the modules that its config makes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mxdit.errors import ModelError
from mxdit.models.skeleton import skeleton_like

# Part of a module's path that gives away what was done to a model -> what that is, and what undoes it.
CHANGES = {
    "base_layer": (
        "adapters",
        "call unload_lora_weights() of the pipeline (unload_lora() of the model), after fuse_lora() if their effect is to stay",
    ),
    **dict.fromkeys(
        ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv"),
        ("fused projections", "call unfuse_qkv_projections()"),
    ),
    "_orig_mod": ("compiled parts", "put their _orig_mod back in their place"),
    "parametrizations": ("parametrized weights", "call torch.nn.utils.parametrize.remove_parametrizations"),
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
