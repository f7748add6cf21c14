"""Progress of work that takes minutes."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mxdit.cli.console import err, tell


class Shown:
    """Progress on stderr: a bar on a terminal, with the time that is left of what is being done; elsewhere a line when something
    new begins."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._bar = self._bars.add_task("", total=None)
        self._what, self._started = "", time.perf_counter()

    def __enter__(self) -> Shown:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def progress(self, what: str, done: float, total: int) -> None:
        """Say what is being done, and how much of it is."""
        if what != self._what and not err.is_terminal:
            tell(f"{time.perf_counter() - self._started:7.1f} s  {what}")
        if what != self._what:
            self._bars.reset(self._bar)
        self._what = what
        self._bars.update(self._bar, description=what, completed=done, total=total)
