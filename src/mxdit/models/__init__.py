"""The model families that mxdit knows: one `ModelSpec` each, found by the class name of a transformer or a text encoder."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mxdit.config.choices import near_names
from mxdit.errors import ModelError
from mxdit.models.encoders import TEXT_ENCODERS, encoder_spec
from mxdit.models.registry import COMPONENTS, GROUP, SPECS, register_family, tasks
from mxdit.models.spec import ModelSpec
from mxdit.models.unsupported import UNSUPPORTED


def about_unknown(name: object, known: Iterable[str] = SPECS) -> str:
    """What to tell whoever named a class that is not one of `known`: why mxdit does not support it, or what it looks like."""
    listed = "`mxdit info --families` and docs/supported-models.md list what mxdit knows."
    if why := UNSUPPORTED.get(str(name)):  # a file may say anything, a list as well
        return f"{name}: {why}. {listed}"
    near = near_names(str(name), known)
    return f"{near} {listed}" if near else listed


def adopt(model: nn.Module, spec: ModelSpec) -> None:
    """Have `spec_of` give `spec` for this one model, whatever is registered."""
    model._mxdit_spec = spec  # pyright: ignore[reportArgumentType]


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of a transformer or a text encoder, which may be of a subclass. Raises ModelError for a class without one."""
    adopted = getattr(model, "_mxdit_spec", None)
    if adopted is not None:
        return adopted
    for cls in type(model).__mro__:
        if cls.__name__ in SPECS:
            return SPECS[cls.__name__]
    encoder = encoder_spec(model)
    if encoder is not None:
        return encoder
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        hint = "Pass the transformer itself rather than a pipeline: pipe.transformer."
    else:
        inner = next((path for path, part in model.named_modules() if type(part).__name__ in SPECS), None)
        add = "mxdit.infer_spec proposes a ModelSpec for it, and register_family takes one: docs/adapting-a-model.md."
        hint = f"It holds one: pass its {inner}." if inner else f"{about_unknown(name)} {add}"
    raise ModelError(
        "mxdit does not know this kind of model",
        where="models",
        got=name,
        hint=hint,
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself. What is changed in it is compiled anew at the next call."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


__all__ = [
    "COMPONENTS",
    "GROUP",
    "SPECS",
    "TEXT_ENCODERS",
    "UNSUPPORTED",
    "ModelSpec",
    "about_unknown",
    "adopt",
    "register_family",
    "spec_of",
    "tasks",
    "uncompiled",
]
