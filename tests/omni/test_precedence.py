"""What a user asks for over a quantized checkpoint, and what its config.json says: which of the two a layer gets."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from vllm_omni.quantization.factory import build_quant_config, resolve_quant_config_from_disk

from layers import building
from mxdit.config import MXConfig
from mxdit.config.steps import StepPolicy
from mxdit.errors import ConfigError
from mxdit.integrations.vllm_omni import register
from mxdit.integrations.vllm_omni.config import MXOmniConfig
from mxdit.integrations.vllm_omni.steps import LOGGER

PACKED = {"quant_method": "mxfp4", "is_checkpoint_serialized": True, "layout": "packed", "version": 1}
NUMERIC = {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True}
POLICY = {"mxfp8": [0], "of": 4}
STORED = {"activation": "bf16", "activation_steps": POLICY, "w4a8_fallback_layers": ["a"], "mxfp4_scale_alg": 2}


def resolved(asked: Any, stored: dict[str, Any]) -> MXConfig:
    """What the engine makes of both for one transformer."""
    register()
    active = build_quant_config(asked)
    with building(active=active):
        component = getattr(active, "resolve", lambda prefix: active)("transformer")
        return ours(resolve_quant_config_from_disk(component, stored))


def ours(config: object) -> MXConfig:
    """What one of the engine's configs holds that is ours."""
    assert isinstance(config, MXOmniConfig)
    return config.config


# What a user asks for, and what is left of `STORED`.
REPLACED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, STORED),
    ({"activation": "mxfp8"}, {"activation": "mxfp8", "mxfp4_scale_alg": 2}),
    (
        {"activation": "mxfp8", "w4a8_fallback_layers": ["b"]},
        {"activation": "mxfp8", "w4a8_fallback_layers": ["b"], "mxfp4_scale_alg": 2},
    ),
    ({"activation_steps": {"bf16": [1]}}, {**STORED, "activation_steps": {"bf16": [1]}}),
    ({"activation_steps": {}}, {**STORED, "activation_steps": {}}),
    ({"w4a8_fallback_steps": [1]}, {**STORED, "activation_steps": {"mxfp8": [1]}}),
    ({"w4a8_fallback_layers": ["b"]}, {**STORED, "w4a8_fallback_layers": ["b"]}),
    ({"mxfp4_scale_alg": 0}, {**STORED, "mxfp4_scale_alg": 0}),
    ({"ignored_layers": ["b"]}, STORED),  # says what the files hold
]


@pytest.mark.parametrize(("asked", "left"), REPLACED, ids=lambda keys: ",".join(keys))
@pytest.mark.parametrize("files", (PACKED, NUMERIC), ids=("packed", "numeric"))
@pytest.mark.parametrize("where", ("everywhere", "by default", "by component"))
def test_a_user_replaces_how_to_run_and_not_what_the_files_hold(asked, left, files, where):
    one = {"method": "mxfp4", **asked}
    config = {
        "everywhere": one,
        "by default": {"default": one, "vae": None},
        "by component": {"transformer": one, "transformer_2": one},
    }[where]
    assert resolved(config, {**files, **STORED}) == MXConfig.from_dict({**files, **left})


def test_nobody_asks_for_anything():
    """Nor does the engine build a model yet, where a user says by hand what the files hold."""
    register()
    assert ours(build_quant_config(PACKED)) == MXConfig.from_dict(PACKED)
    assert resolved(None, {**PACKED, **STORED}) == MXConfig.from_dict({**PACKED, **STORED})


def test_what_the_engine_read_of_one_expert_is_no_wish_for_the_other():
    register()
    first = build_quant_config({**PACKED, "activation": "mxfp8"})
    with building(active=first, detected=True):
        assert ours(resolve_quant_config_from_disk(None, PACKED)) == MXConfig.from_dict(PACKED)


def test_steps_under_either_name_replace_those_under_either():
    stored = {**PACKED, "w4a8_fallback_steps": [3]}
    asked = {"method": "mxfp4", "activation_steps": {"bf16": [1]}}
    assert resolved(asked, stored).activation_steps == StepPolicy({"bf16": (1,)})


def test_the_rule_is_the_engines_but_for_packed_files():
    assert resolved({"method": "mxfp4"}, NUMERIC).rule_of("mxfp4") == "ocp"
    assert resolved({"method": "mxfp4"}, PACKED).rule_of("mxfp4") == "uos"
    assert ours(build_quant_config("mxfp4")).rule_of("mxfp4") == "ocp"
    mixed = {"quant_method": "mxfp8", "layer_methods": {"mxfp4": ["blocks.0.*"]}}
    assert ours(build_quant_config(mixed)).rule_of("mxfp4") == "ocp"


def test_components_that_are_to_run_differently_are_refused():
    asked = {name: {"method": "mxfp4", "activation": a} for name, a in (("transformer", "mxfp8"), ("default", "bf16"))}
    with pytest.raises(ConfigError, match=r"run differently; got .*mxfp8.* and .*bf16"):
        resolved(asked, PACKED)


def test_another_version_of_the_engine_is_said(monkeypatch, caplog):
    logger = logging.getLogger(LOGGER)  # the engine's own takes what is below its name
    logger.addHandler(caplog.handler)
    register()
    assert not caplog.text
    monkeypatch.setattr("mxdit.integrations.vllm_omni.version", lambda distribution: "0.31.0")
    register()
    logger.removeHandler(caplog.handler)
    assert "tested with vLLM-Omni 0.30.x, and this is 0.31.0" in caplog.text
