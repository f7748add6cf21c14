"""The errors that mxdit raises on purpose, one family.

Every message answers the same questions in the same order: where it happened, what is wrong, what was found, what was
wanted, and what to do next.
"""

from __future__ import annotations

from collections.abc import Callable


class MXDiTError(Exception):
    """Base of every error that mxdit raises on purpose.

    Args:
        what: what is wrong, a clause without a full stop.
        where: the thing it happened to (an op, a layer's path, a file).
        field: the field of a request, or the argument, that was given wrongly.
        got: what was found.
        expected: what was wanted instead.
        hint: the next step for the reader.

    The parts stay readable as attributes; ``str(error)`` is the one line made of them, and `line` the same for readers
    who know the field by another name: the console shows ``--size`` for "size".
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        field: str | None = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.field, self.got, self.expected, self.hint = what, where, field, got, expected, hint
        super().__init__(self.line())

    def line(self, name_of: Callable[[str], str] = str) -> str:
        """The whole error in one line; `name_of` says how the reader calls a field."""
        place = " ".join(filter(None, (self.field and name_of(self.field), self.where)))
        line = f"{place}: {self.what}" if place else self.what
        if self.got is not None:
            line += f"; got {self.got}"
        if self.expected is not None:
            line += f"; expected {self.expected}"
        return f"{line}. {self.hint}" if self.hint else line


class ConfigError(MXDiTError):
    """A quantization config that cannot mean anything: an unknown method or key, a pattern without a match."""


class FormatError(MXDiTError):
    """Tensors or names that the codec or an op does not take: dtype, shape, format, rule, rounding mode."""


class CheckpointError(MXDiTError):
    """A checkpoint that is not what it says, or not what the model needs."""


class BackendError(MXDiTError):
    """A backend or device layout that is asked for and cannot answer."""


class ModelError(MXDiTError):
    """A model that mxdit does not know, or that is not the one the request is about."""


class InputError(MXDiTError):
    """Something a user typed: a path, a size, a prompt, an option."""


class Cancelled(MXDiTError):
    """A run that was asked to stop, and did so between two steps."""
