"""`StepPolicy`: what activations are quantized to at some of a request's denoising steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mxdit.config.choices import near_names
from mxdit.errors import ConfigError
from mxdit.numerics.formats import SCHEMES

FIELD = "activation_steps"  # key of a config, field of a request
EXAMPLE = '{"mxfp8": [0, 1, 38, 39], "of": 40}'
GROUPS = "0-1,38,39=mxfp8;20=bf16;of=40"
NAMES = tuple(dict.fromkeys(row.activation for row in SCHEMES.values()))


@dataclass(frozen=True)
class StepPolicy:
    """What activations are quantized to at some denoising steps; at the others every layer has its own activation.

    A step is one of a request's `num_inference_steps`, from 0. A cascade's transformers share one loop, so its steps run on
    from one transformer to the next. At a step that is named, every quantized linear takes that activation; linears that are
    not quantized stay so.

    Attributes:
        activations: "mxfp4", "mxfp8" or "bf16" -> its steps. Empty is no policy.
        of: the number of steps that it was written for. A request of another number is refused, because the same step is
            another noise level there. None: any number that has all of the steps.

    As JSON, in config.json too, both are one object: {"mxfp8": [0, 1, 38, 39], "of": 40}.

    Raises ConfigError for another activation, for steps that are no such numbers, and for a step that is named twice.
    """

    activations: Mapping[str, tuple[int, ...]] = field(hash=False)
    of: int | None = None
    _at: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = {name: _steps(name, steps) for name, steps in self.activations.items()}
        # In one order, because JSON has none: equal policies are written alike.
        object.__setattr__(self, "activations", {name: named[name] for name in NAMES if named.get(name)})
        at: dict[int, str] = {}
        for name, steps in self.activations.items():
            for step in steps:
                if step in at:
                    got, hint = f"step {step} under {at[step]!r} and {name!r}", "Keep one of them."
                    raise ConfigError("a step has two activations", field=FIELD, got=got, hint=hint)
                at[step] = name
        object.__setattr__(self, "_at", at)
        if self.of is None:
            return
        if type(self.of) is not int or self.of < 1:
            raise ConfigError("of is no number of steps", field=FIELD, got=repr(self.of), expected="1 or more")
        if not at:
            raise ConfigError("a number of steps, and no step", field=FIELD, got=f"of {self.of}", expected=EXAMPLE)
        if max(at) >= self.of:
            raise ConfigError(
                "a step beyond the last", field=FIELD, got=max(at), expected=f"0 to {self.of - 1}, of {self.of} steps"
            )

    def __bool__(self) -> bool:
        return bool(self._at)

    def activation_at(self, step: int, steps: int) -> str | None:
        """The activation of every quantized linear at `step` (0 to steps - 1) of a request of `steps`; None: each its own.

        Raises ConfigError as `check`, and for a step that the request does not have.
        """
        self.check(steps)
        if not 0 <= step < steps:
            raise ConfigError("the request has no such step", field=FIELD, got=step, expected=f"0 to {steps - 1}")
        return self._at.get(step)

    def check(self, steps: int) -> None:
        """Raise ConfigError where the policy is not one for a request of `steps` steps."""
        if self.of not in (None, steps):
            raise ConfigError(
                "the policy was written for another number of steps, whose noise levels are others",
                field=FIELD,
                got=f"a request of {steps} steps",
                expected=f"{self.of} steps",
                hint=f"Run {self.of} steps, or write the policy for {steps}: the steps from 0 to {steps - 1}, and of={steps}.",
            )
        if self._at and max(self._at) >= steps:
            raise ConfigError(
                "the policy names a step that the request does not have",
                field=FIELD,
                got=f"step {max(self._at)}, and a request of {steps} steps",
                expected=f"0 to {steps - 1}",
                hint=f"Run at least {max(self._at) + 1} steps, or write the policy for {steps}.",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepPolicy:
        """Read the JSON form."""
        if not isinstance(values, Mapping):
            raise ConfigError("no object of activations and steps", field=FIELD, got=repr(values), expected=EXAMPLE)
        return cls({key: steps for key, steps in values.items() if key != "of"}, values.get("of"))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` gives an equal policy back."""
        written: dict[str, Any] = {name: list(steps) for name, steps in self.activations.items()}
        return written if self.of is None else {**written, "of": self.of}

    @classmethod
    def parse(cls, text: str) -> StepPolicy:
        """Read the text form: STEPS=ACTIVATION, several of them after ";", and of=NUMBER where one is meant.

        STEPS are numbers and ranges, which hold both ends, as in "0-1,38,39=mxfp8;20=bf16;of=40". `str` writes the same.
        """
        values: dict[str, Any] = {}
        for group in filter(None, (part.strip() for part in text.split(";"))):
            left, equals, right = (part.strip() for part in group.partition("="))
            key, value = (left, right) if left == "of" else (right, left)
            if not equals or key in values or (key == "of" and not value.isdecimal()):
                raise ConfigError("not steps and their activation", field=FIELD, got=repr(group), expected=GROUPS)
            values[key] = int(value) if key == "of" else _numbers(value)
        return cls.from_dict(values)

    def __str__(self) -> str:
        groups = [f"{ranges(steps)}={name}" for name, steps in self.activations.items()]
        return ";".join(groups if self.of is None else [*groups, f"of={self.of}"])


def _steps(activation: object, steps: object) -> tuple[int, ...]:
    """The steps of one activation, sorted, each once."""
    if activation not in NAMES:
        hint = near_names(str(activation), NAMES)
        raise ConfigError(
            "unknown activation", field=FIELD, got=repr(activation), expected=f"one of {', '.join(NAMES)}", hint=hint
        )
    if not isinstance(steps, (list, tuple)) or not all(type(step) is int and step >= 0 for step in steps):
        raise ConfigError(
            f"the steps of {activation!r} are no list of step numbers, which count from 0",
            field=FIELD,
            got=repr(steps),
            expected="something like [0, 1]",
        )
    return tuple(sorted(set(steps)))


def _numbers(text: str) -> list[int]:
    """The numbers of "0-2,7", which `ranges` writes."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise ConfigError("neither a step nor a range of steps", field=FIELD, got=repr(part), expected=GROUPS)
        found += range(first, last + 1)
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as in "0-2,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
