"""`Files`: the videos, and the first frames they begin with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mxdit.checkpoint.writer import sync, write_synced
from mxdit.serve.job import Job

SUFFIX = {"video/mp4": ".mp4", "image/png": ".png"}


class Files:
    """Where jobs keep files. All names come from ids that the server made."""

    def __init__(self, data: Path) -> None:
        self._made, self._given = data / "made", data / "given"
        for folder in (self._made, self._given):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self._made, self._given):
            for left in folder.glob(".*"):  # by what did not come to an end
                left.unlink()

    def made(self, job: Job) -> Path:
        """The video or image."""
        return self._made / f"{job.id}{SUFFIX[job.media_type]}"

    def given(self, id: str) -> Path:
        """The first frame."""
        return self._given / id

    def unfinished(self, job: Job) -> Path:
        """Where a worker writes: a name for each attempt, so that a late one never writes into another's."""
        return self._made / f".{job.id}.{job.attempts}.{os.getpid()}{SUFFIX[job.media_type]}"

    def sweep(self, wanted: Callable[[str], bool]) -> None:
        """Remove first frames of ids that nobody wants."""
        for path in self._given.iterdir():
            if not wanted(path.name):
                path.unlink()

    def give(self, id: str, data: bytes) -> None:
        """Keep a first frame, whole and on the disk."""
        partial = self._given / f".{id}"
        write_synced(partial, data)
        os.replace(partial, self.given(id))
        sync(self._given)

    def finish(self, job: Job) -> int:
        """Take over what a worker has written and synced. Gives its bytes."""
        unfinished, made = self.unfinished(job), self.made(job)
        os.replace(unfinished, made)
        sync(self._made)
        return made.stat().st_size

    def remove(self, job: Job) -> None:
        """Everything of a job."""
        for path in (self.made(job), self.given(job.id), self.unfinished(job)):
            path.unlink(missing_ok=True)
