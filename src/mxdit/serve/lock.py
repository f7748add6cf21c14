"""One server for one directory of data."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxdit.errors import InputError


@contextmanager
def only_one(data: Path) -> Iterator[None]:
    """Make the directory, and hold it while the block lasts. Raises InputError where it cannot be made, or another server has it.

    The system lets go of it when this process ends, however it does.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        file = (data / "lock").open("w")
    except OSError as error:
        raise InputError("the directory cannot be written", field="data", where=str(data), got=error.strerror) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                "another server has this directory", field="data", where=str(data), hint="Stop it, or name another one."
            ) from None
        yield
