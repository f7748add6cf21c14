"""What a text encoder's config is, to a caller and in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mxdit.config import MXConfig
from mxdit.config.choices import WHERE
from mxdit.errors import ConfigError
from mxdit.numerics.formats import FORMATS

# transformers has methods of its own that it calls "mxfp4" and "mxfp8" (GPT-OSS's experts; FP8 with E8M0 scales).
PREFIX = "mxdit_"


def encoder_config(own: object, where: str) -> MXConfig:
    """The config of a text encoder: weights only, so activations are left as they are unless the caller says otherwise.

    Args:
        own: a method's name, a dictionary of keys, or an MXConfig.
        where: the component.

    Raises ConfigError for anything else, and for keys that have no place here.
    """
    if not isinstance(own, (str, Mapping, MXConfig)) or (isinstance(own, Mapping) and "quant_method" not in own):
        raise ConfigError(
            "no config for a text encoder",
            where=where,
            got=repr(own),
            expected="a method's name, a dictionary with quant_method, an MXConfig or None",
            hint=f"Such as {where}={{'quant_method': 'mxfp8'}}: keys of the transformers do not hold for it.",
        )
    try:
        config = MXConfig.of(own)
    except ConfigError as error:  # which of a pipeline's configs it is
        place = where if error.where in (None, WHERE) else f"{where}: {error.where}"
        raise ConfigError(
            error.what, where=place, field=error.field, got=error.got, expected=error.expected, hint=error.hint
        ) from None
    if config.activation_steps:
        raise ConfigError("a text encoder runs before the first denoising step", where=where, field="activation_steps")
    if config.require_smooth_scale:
        raise ConfigError("text encoders are not smoothed", where=where, field="require_smooth_scale")
    return config if config.activation else replace(config, activation="bf16")


def is_stated(values: object) -> bool:
    """Whether a `quantization_config` is one that mxdit wrote for transformers."""
    method = str(values.get("quant_method")) if isinstance(values, Mapping) else ""
    return method.startswith(PREFIX) and method.removeprefix(PREFIX) in FORMATS


def stated(config: MXConfig) -> dict[str, Any]:
    """The `quantization_config` of a text encoder's config.json; `read_stated` gives an equal config back."""
    values = config.to_dict()
    return {**values, "quant_method": PREFIX + values["quant_method"]}


def read_stated(values: Mapping[str, Any]) -> MXConfig:
    """The config that a text encoder's config.json states. Raises ConfigError where mxdit did not write it."""
    method = values.get("quant_method")
    if not is_stated(values):
        raise ConfigError(
            "this is no quantization config of mxdit for a text encoder",
            where=WHERE,
            got=f"quant_method {method!r}",
            expected=" or ".join(PREFIX + name for name in FORMATS),
        )
    return MXConfig.from_dict({**values, "quant_method": str(method).removeprefix(PREFIX)})
