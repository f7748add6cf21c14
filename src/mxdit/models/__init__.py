"""The model families that mxdit knows: one `ModelSpec` each, found by the class name of a transformer."""

from __future__ import annotations

from torch import nn

from mxdit.errors import ModelError
from mxdit.models.spec import ModelSpec
from mxdit.models.wan import WAN

SPECS: dict[str, ModelSpec] = {spec.transformer: spec for spec in (WAN,)}
COMPONENTS = tuple(dict.fromkeys(name for spec in SPECS.values() for name in spec.components))


def spec_of(model: nn.Module) -> ModelSpec:
    """The spec of a transformer, which may be of a subclass. Raises ModelError for a class that no spec names."""
    for cls in type(model).__mro__:
        if cls.__name__ in SPECS:
            return SPECS[cls.__name__]
    if not isinstance(model, nn.Module):
        hint = "Pass the transformer itself rather than a pipeline: pipe.transformer."
    else:
        inner = next((path for path, part in model.named_modules() if type(part).__name__ in SPECS), None)
        hint = f"It holds one: pass its {inner}." if inner else "Add a ModelSpec for it: docs/adapting-a-model.md."
    raise ModelError(
        "mxdit does not know this kind of model",
        where="models",
        got=type(model).__name__,
        expected=" or ".join(SPECS),
        hint=hint,
    )


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped, or `model` itself. What is changed in it is compiled anew at the next call."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


__all__ = ["COMPONENTS", "SPECS", "ModelSpec", "spec_of", "uncompiled"]
