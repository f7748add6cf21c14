"""A transformer or text encoder of a model that mxdit knows, built from its config.json without memory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mxdit.errors import CheckpointError, InputError, ModelError
from mxdit.models import SPECS, about_unknown
from mxdit.models.encoders import BLOCKS

# What classes raise for a config that they cannot build from.
UNBUILDABLE = (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError, AttributeError, LookupError)


def skeleton_of(config: Mapping[str, Any], where: str) -> nn.Module:
    """The model that a config.json describes, without memory. Raises CheckpointError, or InputError without its library."""
    encoder = encoder_class(config)
    if encoder is not None:
        return _encoder(encoder, config, where)
    if find_spec("diffusers") is None:
        raise InputError("a package is not installed", where="diffusers", hint="pip install 'mxdit[diffusers]'.")
    import diffusers

    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SPECS:
        raise CheckpointError(
            "mxdit does not know this kind of model", where=where, got=repr(name), hint=about_unknown(name)
        )
    return built(getattr(diffusers, name), config, where)


def built(cls: Any, config: Mapping[str, Any], where: str) -> nn.Module:
    """A model of a class of diffusers, without memory. Raises CheckpointError for a config that makes none."""
    try:
        return _built(cls, config)
    except UNBUILDABLE as error:
        raise CheckpointError("no model can be built from this config", where=where, got=said(error)) from None


def encoder_class(config: Mapping[str, Any]) -> str | None:
    """The class of the text encoder that a config.json of transformers describes; None for one that mxdit does not know."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    return name if isinstance(name, str) and name in BLOCKS else None


def _encoder(name: str, config: Mapping[str, Any], where: str) -> nn.Module:
    if find_spec("transformers") is None:
        raise InputError("a package is not installed", where="transformers", hint="pip install 'mxdit[diffusers]'.")
    import transformers

    cls: Any = getattr(transformers, name)
    try:
        with torch.device("meta"):
            return cls(cls.config_class.from_dict({k: v for k, v in config.items() if k != "quantization_config"}))
    except UNBUILDABLE as error:
        raise CheckpointError("no model can be built from this config", where=where, got=said(error)) from None


def skeleton_like(model: nn.Module) -> nn.Module | None:
    """A transformer in memory as its own class builds it from its own config, without memory; None if it has no config.

    Raises ModelError where the class cannot.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping) or not hasattr(model, "from_config"):
        return None
    try:
        return _built(type(model), config)
    except UNBUILDABLE as error:
        raise ModelError(
            "the model cannot be built from its own config, so it could not be reloaded",
            where=type(model).__name__,
            got=said(error),
        ) from None


def _built(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return cls.from_config({key: value for key, value in config.items() if key != "quantization_config"})


def said(error: Exception) -> str:
    """What an error of other code says, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
