"""Checks of a value against what may be given, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mxdit.errors import ConfigError

WHERE = "quantization config"


def near_names(name: str, known: Iterable[str]) -> str | None:
    """A question that offers the members of `known` that look like `name`, or None where none does."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else None


def check_choice(key: str, value: object, choices: Iterable[str], *, where: str | None = WHERE) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        hint = near_names(value, choices) if isinstance(value, str) else None
        raise ConfigError(
            f"unknown {key}", where=where, got=repr(value), expected=f"one of {', '.join(choices)}", hint=hint
        )


def check_names(key: str, value: object) -> tuple[str, ...]:
    """A list of layers' names as a tuple. Raises ConfigError for anything else."""
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ConfigError(
        f"{key} is no list of layer paths or globs",
        where=WHERE,
        got=repr(value),
        expected="something like ['blocks.0.*']",
    )
