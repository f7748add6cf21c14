"""What a diffusers model's own config says of how its tensors are stored."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mxdit.config import MXConfig
from mxdit.quantize.adapters import beside
from mxdit.quantize.plan import Decision
from mxdit.quantize.steps import remind
from mxdit.version import __version__


def record(model: nn.Module, config: MXConfig, decisions: Mapping[str, Decision]) -> None:
    """Note in a diffusers model's own config how its tensors are stored, for `save_pretrained` to write.

    A policy of the config is noted too; it is carried out by whoever knows the steps. From now on adapters are put beside the
    quantized linears.
    """
    register = getattr(model, "register_to_config", None)
    if callable(register):
        methods = {path: decision.method for path, decision in decisions.items()}
        register(quantization_config=config.serialized(methods, {"mxdit": __version__}))
    remind(model, config.activation_steps)
    beside(model)


def recorded_config(model: nn.Module) -> MXConfig | None:
    """The config that `record` left in a diffusers model."""
    recorded = getattr(getattr(model, "config", None), "quantization_config", None)
    return recorded if isinstance(recorded, MXConfig) else None
