"""MXConfig: what it takes, what it writes, and what it says of a mistake."""

import dataclasses
import json

import pytest

from mxdit.config import ACTIVATIONS, Method, MXConfig
from mxdit.config.steps import StepPolicy
from mxdit.errors import ConfigError
from mxdit.numerics.formats import FORMATS

EXAMPLES = [
    MXConfig("mxfp4"),
    MXConfig("mxfp4", mxfp4_scale_alg=0, activation="bf16", ignored_layers=("blocks.0.*",)),
    MXConfig("mxfp4", w4a8_fallback_layers=("blocks.1.ffn.*",)),
    MXConfig("mxfp4_dualscale", num_bf16_fallback_layers=3, activation="mxfp8"),
    MXConfig("mxfp4_dualscale", is_checkpoint_serialized=True, require_smooth_scale=True, producer={"mxdit": "0.1.0"}),
    MXConfig("mxfp4", is_checkpoint_serialized=True, require_smooth_scale=True),
    MXConfig("mxfp8", ignored_layers=("a", "b")),
]


@pytest.mark.parametrize("config", EXAMPLES, ids=str)
def test_dictionary_and_back_through_json(config):
    again = MXConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.producer == config.producer


def test_config_json_of_the_documents():
    """The example of the format's description, as a runtime that knows only its own keys reads it."""
    stored = MXConfig("mxfp4_dualscale").serialized({"blocks.0.attn1.to_q": None}, {"mxdit": "0.1.0"}).to_dict()
    assert stored == {
        "quant_method": "mxfp4_dualscale",
        "is_checkpoint_serialized": True,
        "ignored_layers": ["blocks.0.attn1.to_q"],
        "activation": "mxfp4",
        "layout": "packed",
        "version": 1,
        "producer": {"mxdit": "0.1.0"},
    }


def test_every_format_is_a_method_and_has_activations():
    assert {str(method) for method in Method} == set(FORMATS) == set(ACTIVATIONS)


def test_defaults_per_method():
    assert MXConfig("mxfp4").effective_activation == "mxfp4" and MXConfig("mxfp4").rule_of("mxfp4") == "uos"
    assert MXConfig("mxfp4", mxfp4_scale_alg=0).rule_of("mxfp4") == "ocp"
    assert (
        MXConfig("mxfp4_dualscale").effective_activation == "mxfp4"
        and MXConfig("mxfp4_dualscale").rule_of("mxfp4_dualscale") is None
    )
    assert MXConfig("mxfp8").effective_activation == "mxfp8"


def test_vllm_omni_names():
    config = MXConfig.from_dict(
        {
            "quant_method": "mxfp4",
            "is_checkpoint_mxfp4_serialized": True,
            "modules_to_not_convert": ["proj_out"],
            "w4a8_fallback_steps": [],
            "w4a8_fallback_layers": None,
            "require_smooth_scale": False,
            "mxfp4_scale_alg": 0,
        }
    )
    assert (
        config.is_checkpoint_serialized and config.ignored_layers == ("proj_out",) and config.rule_of("mxfp4") == "ocp"
    )
    assert MXConfig.from_dict(
        {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True}
    ).is_checkpoint_serialized


@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale", "mxfp8"])
def test_steps_by_our_key_and_by_vllm_omnis(method):
    ours = MXConfig.from_dict({"quant_method": method, "activation_steps": {"mxfp8": [0, 1]}})
    assert ours.activation_steps == StepPolicy({"mxfp8": (0, 1)})
    assert MXConfig.from_dict({"quant_method": method, "w4a8_fallback_steps": [1, 0, 1]}) == ours
    assert MXConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours and hash(ours) == hash(ours)
    both = {"activation_steps": {"mxfp8": [0, 1]}, "w4a8_fallback_steps": [0, 1]}
    assert MXConfig.from_dict({"quant_method": method, **both}) == ours
    assert ours.serialized({}, {}).activation_steps == ours.activation_steps
    none = MXConfig.from_dict({"quant_method": method, "activation_steps": {}})
    assert none.activation_steps is not None and not none.activation_steps  # said, where no key says nothing
    assert "activation_steps" not in none.to_dict() and none.serialized({}, {}).activation_steps is None


@pytest.mark.parametrize("order", [1, -1])
def test_an_alias_counts_only_where_the_key_is_empty(order):
    """As vLLM-Omni reads them."""
    pairs = [("ignored_layers", []), ("modules_to_not_convert", ["a"])][::order]
    assert MXConfig.from_dict({"quant_method": "mxfp4", **dict(pairs)}).ignored_layers == ("a",)
    pairs = [("ignored_layers", ["a"]), ("modules_to_not_convert", [])][::order]
    assert MXConfig.from_dict({"quant_method": "mxfp4", **dict(pairs)}).ignored_layers == ("a",)


def test_of_takes_a_name_a_dictionary_or_a_config():
    assert MXConfig.of("mxfp4") == MXConfig.of({"quant_method": "mxfp4"}) == MXConfig.of(MXConfig("mxfp4"))
    with pytest.raises(ConfigError, match="got a int; expected an MXConfig, a dictionary"):
        MXConfig.of(4)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MXConfig("mxfp4").activation = "bf16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "unknown quant_method; got None; expected one of mxfp4, mxfp4_dualscale, mxfp8"),
        ({"quant_method": "mxfp4_dual"}, "unknown quant_method; got 'mxfp4_dual'.* Did you mean 'mxfp4_dualscale'"),
        (
            {"quant_method": "mxfp4", "ignore_layers": []},
            "unknown key; got 'ignore_layers'. Did you mean 'ignored_layers'",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "unknown quant_method; got 'bitsandbytes'"),
        (["quant_method"], "no dictionary of keys"),
        ({"quant_method": "mxfp4", "producer": "mxdit"}, "producer is no dictionary; got 'mxdit'"),
        ({"quant_method": "mxfp4", "zzz": 1}, "unknown key; got 'zzz'. Known keys: quant_method, ignored_layers,"),
        ({"quant_method": "mxfp4", "ignored_layers": "blocks.0"}, "no list of layer paths.* got 'blocks.0'"),
        ({"quant_method": "mxfp4", "ignored_layers": [3]}, r"no list of layer paths.* got \[3\]"),
        ({"quant_method": "mxfp4", "activation": "fp8"}, "unknown activation; got 'fp8'.* Did you mean 'mxfp8'"),
        (
            {"quant_method": "mxfp8", "activation": "mxfp4"},
            "'mxfp4' do not go with weights in 'mxfp8'; expected activation 'mxfp8' or 'bf16'",
        ),
        ({"quant_method": "mxfp4", "w4a8_fallback_steps": 1}, "steps of 'mxfp8' are no list of step numbers.* got 1"),
        ({"quant_method": "mxfp4", "w4a8_fallback_steps": ["0"]}, "are no list of step numbers"),
        ({"quant_method": "mxfp4", "activation_steps": [0]}, r"no object of activations and steps; got \[0\]"),
        (
            {"quant_method": "mxfp4", "activation_steps": {"mxfp8": [1]}, "w4a8_fallback_steps": [2]},
            "activation_steps is given twice, once under another name",
        ),
        (
            {"quant_method": "mxfp8", "activation_steps": {"mxfp4": [0]}},
            "activation_steps: activations in 'mxfp4' do not go with weights in 'mxfp8'",
        ),
        ({"quant_method": "mxfp4", "num_bf16_fallback_layers": -1}, "no number of blocks; got -1"),
        ({"quant_method": "mxfp4", "num_bf16_fallback_layers": True}, "no number of blocks; got True"),
        (
            {"quant_method": "mxfp4", "num_bf16_fallback_layers": 2, "is_checkpoint_serialized": True},
            "Leave the key out",
        ),
        (
            {"quant_method": "mxfp4", "mxfp4_scale_alg": 1},
            r"unknown mxfp4_scale_alg; got 1; expected 0 \(OCP\) or 2 \(UOS",
        ),
        (
            {"quant_method": "mxfp8", "mxfp4_scale_alg": 2},
            "got 2 with quant_method 'mxfp8'; expected quant_method 'mxfp4'",
        ),
        ({"quant_method": "mxfp4", "require_smooth_scale": True}, "no mul_scale to require"),
        (
            {"quant_method": "mxfp8", "is_checkpoint_serialized": True, "require_smooth_scale": True},
            "no mul_scale to require; got quant_method 'mxfp8'.*expected a serialized 'mxfp4' or 'mxfp4_dualscale'",
        ),
        ({"quant_method": "mxfp4_dualscale", "require_smooth_scale": True}, "is_checkpoint_serialized False"),
        ({"quant_method": "mxfp4", "is_checkpoint_serialized": "yes"}, "no boolean; got 'yes'"),
        ({"quant_method": "mxfp4", "layout": "numeric"}, "unknown layout; got 'numeric'; expected one of packed"),
        ({"quant_method": "mxfp4", "version": 2}, "unknown version.* got 2; expected 1 to 1. Upgrade mxdit"),
        (
            {"quant_method": "mxfp4", "is_checkpoint_mxfp8_serialized": True},
            "got quant_method 'mxfp4'; expected .*'mxfp8'",
        ),
        (
            {"quant_method": "mxfp4", "ignored_layers": ["a"], "modules_to_not_convert": ["b"]},
            r"given twice.* got \['a'\] and \['b'\]",
        ),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        MXConfig.from_dict(values)


def test_a_wish_for_activations_replaces_what_is_stored_for_layers_and_steps():
    policy = StepPolicy({"mxfp8": (0,)})
    stored = MXConfig("mxfp4", activation="bf16", w4a8_fallback_layers=("a",), activation_steps=policy)
    asked = MXConfig("mxfp4", activation="mxfp8")
    assert stored.run_as(asked) == asked
    assert stored.run_as(MXConfig("mxfp4")) == stored
    assert stored.run_as(MXConfig("mxfp4", w4a8_fallback_layers=("b",))).w4a8_fallback_layers == ("b",)
