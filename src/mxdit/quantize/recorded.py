"""What a model's own config says of how its tensors are stored."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mxdit.config import MXConfig
from mxdit.config.encoders import is_stated, read_stated, stated
from mxdit.models import TEXT_ENCODERS, spec_of
from mxdit.quantize.adapters import beside
from mxdit.quantize.plan import Decision
from mxdit.quantize.steps import remind
from mxdit.version import __version__


def record(model: nn.Module, config: MXConfig, decisions: Mapping[str, Decision]) -> None:
    """Note in a model's own config how its tensors are stored, for `save_pretrained` to write.

    A policy of the config is noted too; it is carried out by whoever knows the steps. From now on adapters are put beside the
    quantized linears.
    """
    methods = {path: decision.method for path, decision in decisions.items()}
    note(model, config.serialized(methods, {"mxdit": __version__}))
    remind(model, config.activation_steps)
    beside(model)


def note(model: nn.Module, config: MXConfig) -> None:
    """Put a serialized config into a model's own: as diffusers has it, or for a text encoder as its config.json will."""
    register = getattr(model, "register_to_config", None)
    own = getattr(model, "config", None)
    if callable(register):
        register(quantization_config=config)
    elif own is not None and spec_of(model).components == TEXT_ENCODERS:
        own.quantization_config = stated(config)


def recorded_config(model: nn.Module) -> MXConfig | None:
    """The config that `note` left in a model."""
    recorded = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(recorded, Mapping) and is_stated(recorded):
        return read_stated(recorded)
    return recorded if isinstance(recorded, MXConfig) else None
