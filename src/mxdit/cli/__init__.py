"""The `mxdit` command. Prints live here and nowhere else; bad input is one clear line and exit code 2."""

from __future__ import annotations

import sys

from mxdit.cli import (
    bench,
    calibrate,
    checkpoints,
    client,
    conformance,
    eval,
    generate,
    info,
    serve,
)  # each registers its commands
from mxdit.cli.console import app, option, tell
from mxdit.errors import MXDiTError

__all__ = [
    "app",
    "bench",
    "calibrate",
    "checkpoints",
    "client",
    "conformance",
    "eval",
    "generate",
    "info",
    "main",
    "serve",
]


def main() -> None:
    """Run the command; a known error is one line on stderr and exit code 2, and a traceback is a bug of ours."""
    try:
        app()
    except MXDiTError as error:
        tell(f"error: {error.line(option)}")
        sys.exit(2)
