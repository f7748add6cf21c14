"""Configs on their way through diffusers: what a pipeline's `from_pretrained` is given, and which of a checkpoint's own config
and the caller's counts."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from mxdit.config import ALIASES, STEPS_OF_W4A8, MXConfig
from mxdit.config.choices import near_names
from mxdit.config.components import configs_of, split_keys
from mxdit.config.encoders import encoder_config
from mxdit.errors import ConfigError
from mxdit.models import COMPONENTS, SPECS, TEXT_ENCODERS

logger = logging.getLogger(__name__)


def pipeline_config(method: str, **overrides: Any) -> Any:
    """The `quantization_config=` of a pipeline's `from_pretrained`, one config per component.

    Args:
        method: "mxfp4", "mxfp4_dualscale" or "mxfp8".
        overrides: keys of `MXConfig` for every transformer, and per transformer (`transformer`, `transformer_2`) a dictionary
            of keys that differ there, an MXConfig that replaces all, or None to leave it as it is. `text_encoder`,
            `text_encoder_2` and `text_encoder_3` are left as they are, unless they are given a method's name, a dictionary
            with `quant_method`, or an MXConfig of their own; their activations are not quantized unless it says so.

    Returns:
        A diffusers PipelineQuantizationConfig. A component that the pipeline does not have is passed over by diffusers.

    Raises:
        ConfigError: an unknown method, key or component.

        >>> pipeline_config("mxfp4", ignored_layers=["blocks.0.*"], transformer_2={"activation": "mxfp8"})
        >>> pipeline_config("mxfp4", text_encoder="mxfp8")
    """
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    overrides, encoders = split_keys(overrides, TEXT_ENCODERS)
    shared, own = split_keys(overrides, COMPONENTS)
    keys = {f.name for f in fields(MXConfig)} | {*ALIASES, STEPS_OF_W4A8}
    for key, value in shared.items():
        if key not in keys:
            names = [*COMPONENTS, *TEXT_ENCODERS]
            known = names if isinstance(value, (Mapping, MXConfig)) else [*keys, *names]
            hint = near_names(key, known) or f"Components: {', '.join(names)}. Keys: {', '.join(sorted(keys))}."
            raise ConfigError(
                "neither a key of the config nor a component", where="pipeline_config", got=repr(key), hint=hint
            )
    # Of families that have all that are named: others' further transformers are not in the pipeline.
    families = [spec.components for spec in SPECS.values() if own.keys() <= set(spec.components)] or [COMPONENTS]
    found = configs_of(dict.fromkeys(name for names in families for name in names), method, shared, own)
    mapping: dict[str, Any] = {name: config for name, config in found.items() if config is not None}
    mapping |= encoders_of(encoders)
    if not mapping:
        raise ConfigError(
            "every component is left as it is", where="pipeline_config", hint="Load without quantization_config."
        )
    return PipelineQuantizationConfig(quant_mapping=mapping)


def encoders_of(own: Mapping[str, Any]) -> dict[str, Any]:
    """Text encoder -> what transformers' `from_pretrained` is given for it, of those that are quantized."""
    given = {name: value for name, value in own.items() if value is not None}
    if not given:
        return {}
    from mxdit.integrations.transformers import EncoderConfig  # for those who have transformers

    return {name: EncoderConfig(encoder_config(value, name)) for name, value in given.items()}


def reconciled(stored: MXConfig, asked: object) -> MXConfig:
    """A checkpoint's own config, with the run-time choices of the caller: storage is as stored, activations are as asked."""
    if asked is None:
        return stored
    config = MXConfig.from_dict(asked) if isinstance(asked, Mapping) else asked
    method = getattr(config, "quant_method", type(config).__name__)
    if method != stored.quant_method:
        raise ConfigError(
            "the checkpoint is quantized with another method than the one asked for",
            where="quant_method",
            got=f"'{getattr(method, 'value', method)}' passed to from_pretrained",
            expected=f"'{stored.quant_method}', which its config.json states",
            hint="Leave quantization_config out, or load the BF16 model to quantize it otherwise.",
        )
    config = cast(MXConfig, config)  # nothing else has such a method
    others = config.layer_methods and config.layer_methods != stored.layer_methods
    if set(config.ignored_layers) - set(stored.ignored_layers) or config.num_bf16_fallback_layers or others:
        logger.warning(
            "the checkpoint's own choice of quantized layers is used, and of their methods: its weights are quantized already"
        )
    return stored.run_as(config)


def config_of_caller() -> object:
    """What the caller passed as `quantization_config` to the `from_pretrained` that is loading a quantized checkpoint.

    diffusers drops it before any hook is called, with a warning; the user who asked for mxfp8 would get an mxfp4 model.
    No hook hands it over, so it is read, never changed, from the frame of that one function. Were it not to be found in
    some version, that warning is what is left, and tests/test_diffusers.py says so.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if (
            frame.f_code.co_name == "from_pretrained"
            and frame.f_globals.get("__name__") == "diffusers.models.modeling_utils"
        ):
            return frame.f_locals.get("quantization_config")
        frame = frame.f_back
    return None
