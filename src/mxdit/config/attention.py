"""`AttentionPolicy`: how attention is computed, in which layers and at which denoising steps."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mxdit.config.choices import near_names
from mxdit.config.components import each_of
from mxdit.config.steps import by_step, check_steps, numbers, ranges
from mxdit.errors import ConfigError
from mxdit.numerics.attention import METHODS

FIELD = "attention"  # of a session, of a mode
DEFAULT = "torch"
NAMES = (DEFAULT, *METHODS)
GROUPS = "int8;0-1,38-39=exact;blocks.0.*=torch;of=40"
EXAMPLE = '{"method": "int8", "steps": {"exact": [0, 1]}, "layers": {"blocks.0.*": "torch"}, "of": 40}'


@dataclass(frozen=True)
class AttentionPolicy:
    """How the attention of a transformer is computed: "torch", as diffusers does it by itself, or a method of ours.

    Attributes:
        method: of every layer at every step that nothing else is said of.
        layers: attention layer (path or glob) -> its method. Of two that match a layer, the first counts.
        steps: method -> denoising steps, from 0, at which every layer has that method, as `StepPolicy` counts them.
        of: the number of steps that the policy was written for, or None.

    As JSON an object of these four, or a method's name; as text "int8;0-1,38-39=exact;blocks.0.*=torch;of=40".

    Raises ConfigError for a method that is none, and for steps as `StepPolicy`.
    """

    method: str = DEFAULT
    layers: Mapping[str, str] = field(default_factory=dict, hash=False)
    steps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    of: int | None = None
    _at: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping) or not isinstance(self.steps, Mapping):
            raise ConfigError("layers and steps are objects", field=FIELD, got=repr(self), expected=EXAMPLE)
        for method in (self.method, *self.layers.values()):
            if method not in NAMES:
                hint = near_names(str(method), NAMES)
                raise ConfigError(
                    "unknown method of attention", field=FIELD, got=repr(method), expected=" or ".join(NAMES), hint=hint
                )
        named, at = by_step(self.steps, self.of, NAMES, "method", field=FIELD, example=EXAMPLE)
        object.__setattr__(self, "steps", named)
        object.__setattr__(self, "_at", at)

    def __bool__(self) -> bool:
        return {self.method, *self.layers.values(), *self._at.values()} != {DEFAULT}

    def method_at(self, step: int, steps: int) -> str | None:
        """The method of every layer at a step of a request of `steps`; None: each has its own. Raises ConfigError as `check`."""
        self.check(steps)
        return self._at.get(step)

    def check(self, steps: int) -> None:
        """Raise ConfigError where the policy is not one for a request of `steps` steps."""
        check_steps(self._at, self.of, steps, field=FIELD)

    @classmethod
    def of_value(cls, value: AttentionPolicy | Mapping[str, Any] | str | None) -> AttentionPolicy:
        """A policy from itself, its JSON form, its text form, or None, which is "torch"."""
        if isinstance(value, AttentionPolicy):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if value is None:
            return cls()
        if not isinstance(value, Mapping) or (unknown := [key for key in value if key not in _KEYS]):
            got = repr(value) if not isinstance(value, Mapping) else ", ".join(map(repr, unknown))
            raise ConfigError("not a policy of attention", field=FIELD, got=got, expected=EXAMPLE)
        return cls(**value)

    @classmethod
    def of_each(cls, value: Any, components: Iterable[str], names: Collection[str]) -> dict[str, AttentionPolicy]:
        """Transformer -> its policy, where it has one, of what `of_value` takes or an object as `each_of` reads it."""
        found = each_of(value, components, names, cls.of_value, field=FIELD)
        return {name: policy for name, policy in found.items() if policy}

    @classmethod
    def parse(cls, text: str) -> AttentionPolicy:
        """Read the text form: a method, then, after ";", STEPS=METHOD, LAYERS=METHOD and of=NUMBER in any number and order."""
        method, *groups = (part.strip() for part in text.split(";"))
        layers: dict[str, str] = {}
        steps: dict[str, list[int]] = {}
        of = None
        for group in groups:
            left, equals, right = (part.strip() for part in group.partition("="))
            if not (left and equals and right) or (left == "of" and (of is not None or not right.isdecimal())):
                raise ConfigError("not steps or layers and their method", field=FIELD, got=repr(group), expected=GROUPS)
            if left == "of":
                of = int(right)
            elif re.fullmatch(r"[\d\s,-]+", left):
                steps.setdefault(right, []).extend(numbers(left, field=FIELD, expected=GROUPS))
            else:
                layers[left] = right
        return cls(method, layers, {name: tuple(found) for name, found in steps.items()}, of)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without what is empty; `of_value` gives an equal policy back."""
        steps = {name: list(at) for name, at in self.steps.items()}
        every = {"method": self.method, "layers": dict(self.layers), "steps": steps, "of": self.of}
        return {key: value for key, value in every.items() if value}

    def __str__(self) -> str:
        layers = [f"{layer}={method}" for layer, method in self.layers.items()]
        steps = [f"{ranges(at)}={method}" for method, at in self.steps.items()]
        return ";".join([self.method, *steps, *layers, *([] if self.of is None else [f"of={self.of}"])])


AttentionLike: TypeAlias = AttentionPolicy | Mapping[str, Any] | str
"""A policy, its JSON or text form, or, as an object, one for each transformer under its name."""


def text_of(policies: Mapping[str, AttentionPolicy], components: Iterable[str]) -> str:
    """The policies of a pipeline's transformers in a line: the one that all have, or each one's."""
    every = {name: str(policies.get(name, DEFAULT)) for name in components}
    if len({*every.values()}) == 1:
        return next(iter(every.values()))
    return ", ".join(f"{name}: {policy}" for name, policy in every.items())


_KEYS = ("method", "layers", "steps", "of")
