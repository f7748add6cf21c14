"""`layer_methods`: linears whose method is another one than `quant_method`.

Peers say it layer by layer (AutoRound's `extra_config`, torchao's `FqnToConfig`, ModelOpt's `quantized_layers`) or by groups of
targets (compressed-tensors' `config_groups`). Here a method has the list of its layers, as in `activation_steps` an activation
has the list of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mxdit.config.choices import WHERE, check_choice, check_names
from mxdit.errors import ConfigError
from mxdit.numerics.formats import FORMATS


def check_layer_methods(quant_method: str, layers: object) -> dict[str, tuple[str, ...]]:
    """The layers of other methods than `quant_method` in one order, because JSON has none, and without methods of no layer.

    Raises ConfigError for anything but methods and lists of layer paths or globs, and where `quant_method` is among them.
    """
    if not isinstance(layers, Mapping):
        raise ConfigError(
            "layer_methods is no object of methods and layers",
            where=WHERE,
            got=repr(layers),
            expected='something like {"mxfp8": ["blocks.0.*"]}',
        )
    for method in layers:
        check_choice("method in layer_methods", method, FORMATS)
    named = {name: check_names(f"layer_methods {name}", layers[name]) for name in FORMATS if name in layers}
    if named.get(quant_method):
        raise ConfigError(
            "layer_methods names the method that all other layers have",
            where=WHERE,
            got=f"'{quant_method}'",
            expected=" or ".join(name for name in FORMATS if name != quant_method),
            hint="Leave it out: it is for exceptions of quant_method. An empty object is none.",
        )
    return {name: patterns for name, patterns in named.items() if patterns}


def exceptions_of(quant_method: str, methods: Mapping[str, str | None]) -> dict[str, Any]:
    """The keys that list, by their paths, the linears that are not of `quant_method`.

    Args:
        methods: linear -> its method, None where it is in its float dtype.
    """
    others = dict.fromkeys(method for method in methods.values() if method not in (None, quant_method))
    return {
        "ignored_layers": tuple(path for path, method in methods.items() if method is None),
        "layer_methods": {str(of): tuple(path for path, method in methods.items() if method == of) for of in others},
    }
