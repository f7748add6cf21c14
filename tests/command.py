"""`mxdit` as its users call it."""

from __future__ import annotations

import sys

import pytest

from mxdit import cli


def mxdit_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mxdit ARGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mxdit", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
