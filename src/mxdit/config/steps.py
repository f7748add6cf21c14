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
        named, at = by_step(self.activations, self.of, NAMES, "activation", field=FIELD, example=EXAMPLE)
        object.__setattr__(self, "activations", named)
        object.__setattr__(self, "_at", at)

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
        check_steps(self._at, self.of, steps, field=FIELD)

    @classmethod
    def of_value(cls, value: StepPolicy | Mapping[str, Any] | None) -> StepPolicy:
        """A policy from itself, its JSON form, or None, which is none."""
        return value if isinstance(value, StepPolicy) else cls.from_dict({} if value is None else value)

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
            values[key] = int(value) if key == "of" else numbers(value, field=FIELD, expected=GROUPS)
        return cls.from_dict(values)

    def __str__(self) -> str:
        groups = [f"{ranges(steps)}={name}" for name, steps in self.activations.items()]
        return ";".join(groups if self.of is None else [*groups, f"of={self.of}"])


def by_step(
    named: Mapping[str, object], of: object, names: Iterable[str], what: str, *, field: str, example: str
) -> tuple[dict[str, tuple[int, ...]], dict[int, str]]:
    """Name -> its steps, sorted, and step -> its name. In the order of `names`, because JSON has none: equal policies are
    written alike.

    Raises ConfigError for another name, for steps that are no such numbers, for a step that is named twice, and for a number
    of steps `of` that is none, or too few.
    """
    names = tuple(names)
    each = {name: _steps(name, steps, names, what, field=field) for name, steps in named.items()}
    each = {name: each[name] for name in names if each.get(name)}
    at: dict[int, str] = {}
    for name, steps in each.items():
        for step in steps:
            if step in at:
                got, hint = f"step {step} under {at[step]!r} and {name!r}", "Keep one of them."
                raise ConfigError(f"a step has two {what}s", field=field, got=got, hint=hint)
            at[step] = name
    if of is None:
        return each, at
    if type(of) is not int or of < 1:
        raise ConfigError("of is no number of steps", field=field, got=repr(of), expected="1 or more")
    if not at:
        raise ConfigError("a number of steps, and no step", field=field, got=f"of {of}", expected=example)
    if max(at) >= of:
        raise ConfigError("a step beyond the last", field=field, got=max(at), expected=f"0 to {of - 1}, of {of} steps")
    return each, at


def check_steps(at: Mapping[int, str], of: int | None, steps: int, *, field: str) -> None:
    """Raise ConfigError where what is said of steps is not for a request of `steps` steps."""
    if of not in (None, steps):
        raise ConfigError(
            "the policy was written for another number of steps, whose noise levels are others",
            field=field,
            got=f"a request of {steps} steps",
            expected=f"{of} steps",
            hint=f"Run {of} steps, or write the policy for {steps}: the steps from 0 to {steps - 1}, and of={steps}.",
        )
    if at and max(at) >= steps:
        raise ConfigError(
            "the policy names a step that the request does not have",
            field=field,
            got=f"step {max(at)}, and a request of {steps} steps",
            expected=f"0 to {steps - 1}",
            hint=f"Run at least {max(at) + 1} steps, or write the policy for {steps}.",
        )


def _steps(name: object, steps: object, names: tuple[str, ...], what: str, *, field: str) -> tuple[int, ...]:
    if name not in names:
        hint = near_names(str(name), names)
        raise ConfigError(
            f"unknown {what}", field=field, got=repr(name), expected=f"one of {', '.join(names)}", hint=hint
        )
    if not isinstance(steps, (list, tuple)) or not all(type(step) is int and step >= 0 for step in steps):
        raise ConfigError(
            f"the steps of {name!r} are no list of step numbers, which count from 0",
            field=field,
            got=repr(steps),
            expected="something like [0, 1]",
        )
    return tuple(sorted(set(steps)))


def numbers(text: str, *, field: str, expected: str) -> list[int]:
    """The numbers of "0-2,7", which `ranges` writes. Raises ConfigError where they are none."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise ConfigError("neither a step nor a range of steps", field=field, got=repr(part), expected=expected)
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
