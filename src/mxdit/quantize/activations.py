"""What the activations of a quantized model are quantized to, over the same weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from mxdit.config import ACTIVATIONS, check_activation
from mxdit.errors import ConfigError, ModelError
from mxdit.layers import MXLinear, linears_of
from mxdit.models import spec_of, uncompiled
from mxdit.numerics.formats import scheme_for
from mxdit.quantize.plan import Decision, check_groups, resolve
from mxdit.quantize.recorded import note, recorded_config

logger = logging.getLogger(__name__)


def set_activation(model: nn.Module, activation: str, layers: Iterable[str] | None = None) -> None:
    """Set what the activations of a quantized model are quantized to, over the same weights, from the next call on.

    Args:
        model: a model that mxdit quantized or loaded.
        activation: "mxfp4", "mxfp8" or "bf16" (not at all).
        layers: paths or globs of the linears it applies to; None means every quantized one whose weights go with it: in a
            model of two methods that may be those of one.

    Raises:
        ConfigError: a pattern matches no quantized linear, the weights do not go with such activations, or layers that
            runtimes fuse would differ.
        ModelError: the model has no quantized linear.
    """
    model = uncompiled(model)
    spec = spec_of(model)
    quantized_layers = {path: module for path, module in linears_of(model) if isinstance(module, MXLinear)}
    if not quantized_layers:
        raise ModelError(
            "the model has no quantized linear", where=type(model).__name__, hint="Quantize it first: mxdit.quantize_."
        )
    if layers is None:
        check_activation(
            {layer.method for layer in quantized_layers.values()}, activation, where=next(iter(quantized_layers))
        )
        chosen = [path for path, layer in quantized_layers.items() if activation in ACTIVATIONS[layer.method]]
    else:
        chosen = list(
            resolve(model, list(quantized_layers), _pattern_list(layers), "layers", kind="a quantized linear")
        )
    for path in chosen:
        check_activation(quantized_layers[path].method, activation, where=path)
    after = {
        **{path: layer.activation for path, layer in quantized_layers.items()},
        **dict.fromkeys(chosen, activation),
    }
    check_groups(
        {
            path: Decision(scheme_for(layer.method, after[path]).name, after[path], method=layer.method)
            for path, layer in quantized_layers.items()
        },
        spec,
    )
    for path in chosen:
        quantized_layers[path].activation = activation
    _note_activations(model, quantized_layers)


def _note_activations(model: nn.Module, layers: Mapping[str, MXLinear]) -> None:
    """Bring a model's recorded config up to date with the activations that its layers now have."""
    recorded = recorded_config(model)
    if recorded is None:
        return
    # A config can say one activation for its main method, each other one's own, and MXFP8 for some layers.
    main = [layer.activation for layer in layers.values() if layer.method == recorded.quant_method]
    base = next((activation for activation in main if activation != "mxfp8"), "mxfp8")
    updated = replace(recorded, activation=base, w4a8_fallback_layers=())
    raised = [path for path, layer in layers.items() if layer.activation != updated.activation_of(layer.method)]
    unsaid = {layers[path].activation for path in raised} - {"mxfp8"}
    if unsaid:
        logger.warning(
            "%s: activations in %s at once hold for this run only; a saved copy would run with %s",
            type(model).__name__,
            " and ".join(sorted({layer.activation for layer in layers.values()} - {"mxfp8"})),
            recorded.effective_activation,
        )
        return
    note(model, replace(updated, w4a8_fallback_layers=tuple(raised)))


def _pattern_list(layers: Iterable[str]) -> list[str]:
    if isinstance(layers, str):
        raise ConfigError(
            "layers is one string", where="set_activation", got=repr(layers), expected=f"a list, as in {[layers]}"
        )
    return list(layers)
