"""`MXConfig`: one frozen dataclass that is both the caller's choice and the on-disk `quantization_config`.

Key names are those that users of Wan2.2 know from vLLM-Omni; `activation`, `layout`, `version` and `producer` are ours.
A config names layers by their diffusers module paths and knows no model: `mxdit.plan` applies it to one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, TypeAlias

from mxdit.config.choices import WHERE, check_choice, check_names, near_names
from mxdit.config.methods import check_layer_methods, exceptions_of
from mxdit.config.steps import StepPolicy
from mxdit.errors import ConfigError
from mxdit.numerics.formats import FORMATS, SCHEMES


class Method(StrEnum):
    """The names of `formats.FORMATS`, as a member of a config.

    An Enum because diffusers reads `quant_method.value`; a *string* Enum because it is also compared with, hashed as and
    written to JSON as its plain name.
    """

    MXFP4 = "mxfp4"
    MXFP4_DUALSCALE = "mxfp4_dualscale"
    MXFP8 = "mxfp8"


FORMAT_VERSION = 1
LAYOUTS = ("packed",)
# What activations may be over each weight format, the default first.
ACTIVATIONS = {name: tuple(row.activation for row in SCHEMES.values() if name in row.weights) for name in FORMATS}
# `mxfp4_scale_alg` is the operator's attribute `scale_alg` (docs/numerics.md sections 2.2 and 2.5b).
SCALE_RULES = {0: "ocp", 2: "uos"}
DEFAULT_SCALE_ALG = 2
ALIASES = {
    "modules_to_not_convert": "ignored_layers",
    "is_checkpoint_mxfp4_serialized": "is_checkpoint_serialized",
    "is_checkpoint_mxfp8_serialized": "is_checkpoint_serialized",
}
STEPS_OF_W4A8 = "w4a8_fallback_steps"  # vLLM-Omni's `activation_steps`: MXFP8 at these, of any number of steps


@dataclass(frozen=True)
class MXConfig:
    """How one transformer is quantized.

    Attributes:
        quant_method: format of the weights: "mxfp4", "mxfp4_dualscale" or "mxfp8".
        ignored_layers: linears that stay in their float dtype: diffusers module paths or globs ("blocks.0.*").
        num_bf16_fallback_layers: the first N blocks stay in their float dtype; online only. None takes the method's
            default: 0, and for "mxfp4_dualscale" 5, but at most a sixth of the model's blocks, and no layer that
            `layer_methods` names.
        layer_methods: linears of another method than `quant_method`: method -> paths or globs, as in
            {"mxfp8": ["blocks.0.*", "*.ffn.net.2"]}. What the two above keep stays in its float dtype.
        activation: what activations are quantized to at run time, over the same weights: "mxfp4", "mxfp8", or "bf16",
            which means not at all. None takes the weights' own precision; layers of `layer_methods` do so unless it is "bf16".
        w4a8_fallback_layers: linears (paths or globs), of any method, whose activations are MXFP8 whatever `activation` says.
        activation_steps: what all quantized linears' activations are at some denoising steps, whatever the two above say: a
            `StepPolicy`, or its JSON form {"mxfp8": [0, 1, 38, 39], "of": 40}. Of two methods, the one whose weights do not
            go with a step's activation keeps its own. `from_dict` also takes vLLM-Omni's key for it,
            `w4a8_fallback_steps`: a list of steps with MXFP8 activations.
        mxfp4_scale_alg: for layers in "mxfp4" only, the scale rule: 0 (OCP) or 2 (UOS, Qmax 7.25; default).
        embedding: of a text encoder: format of its token table, of which a lookup decodes rows: "mxfp4", "mxfp4_dualscale" or
            "mxfp8". None leaves it in its float dtype.
        require_smooth_scale: for serialized four-bit methods only: refuse a checkpoint whose four-bit layers lack `mul_scale`.
        is_checkpoint_serialized: the checkpoint's weights are already quantized.
        layout: how a serialized checkpoint stores them.
        version: of the layout.
        producer: what wrote the checkpoint, name -> version.

    Raises ConfigError for a value that is not listed here, and for a key that has no meaning for the method.
    """

    quant_method: str
    ignored_layers: tuple[str, ...] = ()
    num_bf16_fallback_layers: int | None = None
    layer_methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    activation: str | None = None
    w4a8_fallback_layers: tuple[str, ...] = ()
    activation_steps: StepPolicy | None = None
    mxfp4_scale_alg: int | None = None
    embedding: str | None = None
    require_smooth_scale: bool = False
    is_checkpoint_serialized: bool = False
    layout: str = "packed"
    version: int = FORMAT_VERSION
    producer: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        check_choice("quant_method", self.quant_method, FORMATS)
        method = Method(self.quant_method)
        _set(self, "quant_method", method)
        _set(self, "ignored_layers", check_names("ignored_layers", self.ignored_layers))
        _set(self, "layer_methods", check_layer_methods(method, self.layer_methods))
        _set(self, "w4a8_fallback_layers", check_names("w4a8_fallback_layers", self.w4a8_fallback_layers))
        if not isinstance(self.producer, Mapping):
            raise ConfigError(
                "producer is no dictionary", where=WHERE, got=repr(self.producer), expected="name: version"
            )
        for key in ("require_smooth_scale", "is_checkpoint_serialized"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(
                    f"{key} is no boolean", where=WHERE, got=repr(getattr(self, key)), expected="true or false"
                )
        if self.activation is not None:
            check_activation(method, self.activation)
        if self.w4a8_fallback_layers:
            check_activation(method, "mxfp8")
        if self.activation_steps is not None:
            if not isinstance(self.activation_steps, StepPolicy):
                _set(self, "activation_steps", StepPolicy.from_dict(self.activation_steps))
            for activation in self.activation_steps.activations:
                check_activation(self.methods, activation, where=None, field="activation_steps")
        if self.embedding is not None:
            check_choice("embedding", self.embedding, FORMATS)
            _set(self, "embedding", Method(self.embedding))
        self._check_fallback_blocks()
        self._check_scale_alg()
        smooths = any(FORMATS[name].smooths for name in self.methods)
        if self.require_smooth_scale and not (self.is_checkpoint_serialized and smooths):
            raise ConfigError(
                "require_smooth_scale is set where there is no mul_scale to require",
                where=WHERE,
                got=f"quant_method '{method}', is_checkpoint_serialized {self.is_checkpoint_serialized}",
                expected="a serialized 'mxfp4' or 'mxfp4_dualscale' checkpoint",
                hint="Leave the key out.",
            )
        check_choice("layout", self.layout, LAYOUTS)
        if type(self.version) is not int or not 1 <= self.version <= FORMAT_VERSION:
            raise ConfigError(
                "unknown version of the layout",
                where=WHERE,
                got=repr(self.version),
                expected=f"1 to {FORMAT_VERSION}",
                hint="Upgrade mxdit to read this checkpoint.",
            )

    def _check_fallback_blocks(self) -> None:
        blocks = self.num_bf16_fallback_layers
        if blocks is not None and (type(blocks) is not int or blocks < 0):
            raise ConfigError(
                "num_bf16_fallback_layers is no number of blocks", where=WHERE, got=repr(blocks), expected="0 or more"
            )
        if blocks and self.is_checkpoint_serialized:
            raise ConfigError(
                "num_bf16_fallback_layers is set for a serialized checkpoint, whose layers were chosen when it was written",
                where=WHERE,
                got=blocks,
                expected="ignored_layers with the path of every layer that stayed",
                hint="Leave the key out.",
            )

    def _check_scale_alg(self) -> None:
        if "mxfp4" not in self.methods:
            if self.mxfp4_scale_alg is not None:
                raise ConfigError(
                    "mxfp4_scale_alg is set for a method whose scale rule is fixed",
                    where=WHERE,
                    got=f"{self.mxfp4_scale_alg!r} with quant_method '{self.quant_method}'",
                    expected="quant_method 'mxfp4', or 'mxfp4' among layer_methods",
                    hint="Leave the key out.",
                )
        elif self.mxfp4_scale_alg is None:
            _set(self, "mxfp4_scale_alg", DEFAULT_SCALE_ALG)
        elif type(self.mxfp4_scale_alg) is not int or self.mxfp4_scale_alg not in SCALE_RULES:
            raise ConfigError(
                "unknown mxfp4_scale_alg",
                where=WHERE,
                got=repr(self.mxfp4_scale_alg),
                expected="0 (OCP) or 2 (UOS with Qmax 7.25)",
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that its layers may have, `quant_method` first."""
        return (str(self.quant_method), *self.layer_methods)

    @property
    def effective_activation(self) -> str:
        """`activation`, or the method's own where none was chosen."""
        return self.activation or ACTIVATIONS[self.quant_method][0]

    def activation_of(self, method: str) -> str:
        """What activations over layers of one of `methods` are where no layer or step is named: "bf16" is for all of them, any
        other `activation` for `quant_method`, and another method has its own."""
        asked = self.effective_activation
        return asked if asked == "bf16" or method == self.quant_method else ACTIVATIONS[method][0]

    def rule_of(self, method: str) -> str | None:
        """Name of the scale rule of layers of one of `methods`, or None where the format has only one."""
        return SCALE_RULES[self.mxfp4_scale_alg] if method == "mxfp4" and self.mxfp4_scale_alg is not None else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MXConfig:
        """Read a `quantization_config`, ours or one with vLLM-Omni's keys. Raises ConfigError for an unknown key."""
        if not isinstance(values, Mapping):
            raise ConfigError("no dictionary of keys", where=WHERE, got=repr(values), expected="a JSON object")
        check_choice("quant_method", values.get("quant_method"), FORMATS)
        known = [f.name for f in fields(cls)]
        accepted = [*known, *ALIASES, STEPS_OF_W4A8]
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if key not in accepted:
                hint = near_names(key, accepted) or f"Known keys: {', '.join(accepted)}."
                raise ConfigError("unknown key", where=WHERE, got=repr(key), hint=hint)
            if key == STEPS_OF_W4A8:
                if value in (None, [], ()):  # empty is what a runtime that knows the key writes by default
                    continue
                name, value = "activation_steps", {"mxfp8": value}
            if name == "activation_steps" and value is not None and not isinstance(value, StepPolicy):
                value = StepPolicy.from_dict(value)
            if value is not None:
                # As vLLM-Omni reads them: an alias counts where the key itself is missing or empty.
                if found.get(name) and value and _list_or_self(found[name]) != _list_or_self(value):
                    raise ConfigError(
                        f"{name} is given twice, once under another name",
                        where=WHERE,
                        got=f"{found[name]!r} and {value!r}",
                        hint=f"Keep {name!r} only.",
                    )
                found[name] = found.get(name) or value
        for method in ("mxfp4", "mxfp8"):
            if values.get(f"is_checkpoint_{method}_serialized") and found["quant_method"] != method:
                raise ConfigError(
                    f"is_checkpoint_{method}_serialized is set for another method",
                    where=WHERE,
                    got=f"quant_method {found['quant_method']!r}",
                    expected=f"quant_method '{method}'",
                    hint="Use is_checkpoint_serialized, which goes with every method.",
                )
        return cls(**found)

    @classmethod
    def of(cls, config: ConfigLike) -> MXConfig:
        """`config` itself, or the one that a method's name or a dictionary of keys stands for."""
        if isinstance(config, MXConfig):
            return config
        if isinstance(config, str):
            return cls(config)
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        raise ConfigError(
            "this is no quantization config of mxdit",
            where=WHERE,
            got=f"a {type(config).__name__}",
            expected=f"an MXConfig, a dictionary of its keys, or one of {', '.join(FORMATS)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON-serializable dictionary of config.json; `from_dict` gives an equal config back."""
        optional = {
            "activation": self.activation,
            "num_bf16_fallback_layers": self.num_bf16_fallback_layers,
            "layer_methods": {name: list(layers) for name, layers in self.layer_methods.items()} or None,
            "w4a8_fallback_layers": list(self.w4a8_fallback_layers) or None,
            "activation_steps": self.activation_steps.to_dict() if self.activation_steps else None,
            "mxfp4_scale_alg": self.mxfp4_scale_alg,
            "embedding": self.embedding and str(self.embedding),
            "require_smooth_scale": self.require_smooth_scale or None,
            "producer": dict(self.producer) or None,
        }
        return {
            "quant_method": str(self.quant_method),
            "is_checkpoint_serialized": self.is_checkpoint_serialized,
            "ignored_layers": list(self.ignored_layers),
            "layout": self.layout,
            "version": self.version,
            **{key: value for key, value in optional.items() if value is not None},
        }

    def run_as(self, asked: MXConfig) -> MXConfig:
        """This config of a stored checkpoint with the run-time choices of another one: a wish for activations in general
        replaces what is stored for layers and steps, a wish for layers or for steps replaces what is stored for those."""
        layers, steps = asked.w4a8_fallback_layers, asked.activation_steps
        if asked.activation is not None:
            return replace(self, activation=asked.activation, w4a8_fallback_layers=layers, activation_steps=steps)
        return replace(
            self,
            w4a8_fallback_layers=layers or self.w4a8_fallback_layers,
            activation_steps=self.activation_steps if steps is None else steps,
        )

    def serialized(self, methods: Mapping[str, str | None], producer: Mapping[str, str]) -> MXConfig:
        """This config as a checkpoint states it: no default left open, and by its path every layer that is no exception of
        `quant_method`.

        Args:
            methods: linear -> the method that it is stored in, None where it stayed in its float dtype.
            producer: what writes the checkpoint, name -> version.
        """
        return replace(
            self,
            **exceptions_of(self.quant_method, methods),
            num_bf16_fallback_layers=None,
            activation=self.effective_activation,
            activation_steps=self.activation_steps or None,
            is_checkpoint_serialized=True,
            version=FORMAT_VERSION,
            producer=dict(producer),
        )


ConfigLike: TypeAlias = MXConfig | str | Mapping[str, Any]


def check_activation(
    methods: str | Collection[str], activation: str | None, *, where: str | None = WHERE, field: str | None = None
) -> None:
    """Raise ConfigError unless activations may be `activation` over weights in a method, or in one of several."""
    check_choice("activation", activation, dict.fromkeys(row.activation for row in SCHEMES.values()), where=where)
    methods = [methods] if isinstance(methods, str) else methods
    able = list(dict.fromkeys(name for method in methods for name in ACTIVATIONS[method]))
    if activation not in able:
        over = " and ".join(f"'{method}'" for method in methods)
        raise ConfigError(
            f"activations in {activation!r} do not go with weights in {over}",
            where=where,
            field=field,
            expected=f"activation {' or '.join(map(repr, able))}",
            hint="Keep that, or quantize the weights to 'mxfp4', over which activations may be in any precision.",
        )


def _list_or_self(value: object) -> object:
    """A tuple as the list that JSON makes of it; anything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def _set(config: MXConfig, key: str, value: object) -> None:
    object.__setattr__(config, key, value)  # how a frozen dataclass normalizes its own fields
