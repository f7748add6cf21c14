"""The model families that mxdit knows: one `ModelSpec` each, found by the class name of a transformer or a text encoder."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from mxdit.config.choices import near_names
from mxdit.errors import ModelError
from mxdit.models import families
from mxdit.models.encoders import TEXT_ENCODERS, encoder_spec
from mxdit.models.spec import ModelSpec
from mxdit.models.unsupported import UNSUPPORTED

SPECS: dict[str, ModelSpec] = {}  # by the class name of the transformer
COMPONENTS: list[str] = []  # every name that a pipeline of any family gives a transformer


def register_family(spec: ModelSpec) -> None:
    """Let mxdit know a family, in place of one of the same transformer class; docs/adapting-a-model.md says how to write it.

    Raises ModelError for a task of its pipelines that no preset fits whatever the model, or pipelines without a geometry.
    """
    for task in {called.task for called in spec.pipelines.values()}:
        if spec.geometry is None or not any(
            p.task == task and not p.config and p.components is None for p in spec.presets
        ):
            raise ModelError(
                "the ModelSpec cannot run its pipelines",
                where=spec.transformer,
                expected=f"a geometry, and for {task!r} a last preset that fits any model of the family",
                hint="docs/adapting-a-model.md has the fields.",
            )
    SPECS[spec.transformer] = spec
    COMPONENTS.extend(name for name in spec.components if name not in COMPONENTS)


_own = [
    spec
    for module in iter_modules(families.__path__)
    for spec in import_module(f"{families.__name__}.{module.name}").SPECS
]
# Those whose releases mxdit reads come first: they are told from others by their tensors, and the first of all where a file
# has the names of diffusers, which says nothing of the family.
for _spec in sorted(_own, key=lambda spec: not spec.original):
    register_family(_spec)


def tasks() -> tuple[str, ...]:
    """Everything that a model of some family can be asked to make: "t2v", "i2v", "t2i"."""
    return tuple(dict.fromkeys(made.task for spec in SPECS.values() for made in spec.pipelines.values()))


def about_unknown(name: object, known: Iterable[str] = SPECS) -> str:
    """What to tell whoever named a class that is not one of `known`: why mxdit does not support it, or what it looks like."""
    listed = "`mxdit info --families` and docs/supported-models.md list what mxdit knows."
    if why := UNSUPPORTED.get(str(name)):  # a file may say anything, a list as well
        return f"{name}: {why}. {listed}"
    near = near_names(str(name), known)
    return f"{near} {listed}" if near else listed


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of a transformer or a text encoder, which may be of a subclass. Raises ModelError for a class without one."""
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
        add = "docs/adapting-a-model.md says how to add a family."
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
    "SPECS",
    "TEXT_ENCODERS",
    "UNSUPPORTED",
    "ModelSpec",
    "about_unknown",
    "register_family",
    "spec_of",
    "tasks",
    "uncompiled",
]
