"""A transformer of a model that mxdit knows, built from its config.json without memory."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mxdit.errors import CheckpointError, InputError
from mxdit.models import SPECS


def skeleton_of(config: Mapping[str, Any], where: str) -> nn.Module:
    """The transformer that a config.json describes, without memory. Raises CheckpointError, or InputError without diffusers."""
    if find_spec("diffusers") is None:
        raise InputError("a package is not installed", where="diffusers", hint="pip install 'mxdit[diffusers]'.")
    import diffusers

    name = config.get("_class_name")
    if not isinstance(name, str) or name not in SPECS:
        raise CheckpointError(
            "mxdit does not know this kind of model", where=where, got=repr(name), expected=" or ".join(SPECS)
        )
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"):
            return getattr(diffusers, name).from_config(plain)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError, AttributeError, LookupError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError("no model can be built from this config", where=where, got=said[:200]) from None
