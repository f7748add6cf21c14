"""`Dispatcher`: a thread for each device or engine that jobs run on, and one that removes what has expired.

A runner takes jobs from the `Desk` and tells it what becomes of them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from prometheus_client import Histogram

from mxdit.serve.files import Files
from mxdit.serve.job import CANCELLED, Job
from mxdit.serve.jobs import Jobs

log = logging.getLogger(__name__)

LOOK = 0.02  # seconds between two looks for a job, for a cancelled one, and for the end
CLEAN = 60.0  # seconds between two looks for what has expired
GRACE = 60.0  # seconds that a worker has to end its step when the server stops
STEP = "How long a denoising step took, of those behind a job's first."
STEPS = (0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)  # seconds


class Desk:
    """Where runners get jobs and tell what became of them. May be called from any thread.

    Attributes:
        files: where a job's file is written, under `unfinished`, and its first frame lies.
        stopping: set when runners are to end.
        ready: set once a runner can run a job.
        told: called, from any thread, when a job has changed.
        step_seconds: for Prometheus.
        workers: device -> process number.
        peak_bytes: device -> the most memory that its last job held.
    """

    def __init__(self, jobs: Jobs, files: Files) -> None:
        self._jobs, self.files = jobs, files
        self.stopping, self.ready = threading.Event(), threading.Event()
        self.told: Callable[[], object] = lambda: None
        self.step_seconds = Histogram("mxdit_step_seconds", STEP, ["model"], registry=None, buckets=STEPS)
        self.workers: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def take(self, models: Collection[str], engine: str | None = None) -> Job | None:
        """The next job of these models, which runs from now on; see `Jobs.take`."""
        job = self._jobs.take(models, engine)
        if job is not None:
            self.told()
        return job

    def sent(self, job: Job, remote: str) -> None:
        """An engine has the job, and calls it so."""
        self._jobs.sent(job.id, remote)

    def cancelled(self, job: Job) -> bool:
        found = self._jobs.get(job.id, forgotten=True)
        return found is None or found.cancel > 0

    def stepped(self, job: Job, step: int, steps: int | None = None) -> None:
        """So many steps are done, of so many where the job did not know."""
        self._jobs.stepped(job.id, step, steps)
        self.told()

    def complete(self, job: Job, seconds: float, found: Mapping[str, Any] | None = None) -> None:
        """The file is written and synced; `found` are fields that it tells of."""
        self._jobs.complete(job.id, seconds, self.files.finish(job), {**job.fields, **(found or {})})
        self.told()

    def end(self, job: Job, code: str, message: str) -> None:
        """The job has failed, for good."""
        self.files.unfinished(job).unlink(missing_ok=True)
        if code == CANCELLED:
            self.files.given(job.id).unlink(missing_ok=True)
        self._jobs.fail(job.id, code, message)
        self.forget(self._jobs.left())
        self.told()

    def put_back(
        self, job: Job, *, counts: bool = True, keep: bool = False, because: tuple[str, str] | None = None
    ) -> None:
        """The job waits again; see `Jobs.put_back`."""
        self.files.unfinished(job).unlink(missing_ok=True)
        self._jobs.put_back(job.id, counts=counts, keep=keep, because=because)
        self.told()

    def release(self, engines: Collection[str]) -> None:
        """Let jobs of these engines, that wait, go to others."""
        self._jobs.release(engines)

    def forget(self, jobs: Sequence[Job]) -> None:
        """Remove ended jobs and their files."""
        for job in jobs:
            if self._jobs.remove(job.id):
                self.files.remove(job)


class Runner(Protocol):
    """What runs jobs; `serve` returns once the desk is stopping."""

    name: str

    def serve(self, desk: Desk) -> None: ...


class Dispatcher(Desk):
    """The desk, with its runners at work from `start` to `stop`.

    Args:
        jobs, files: what there is to do, and where it goes.
        runners: each gets a thread.
        most_bytes: that the files of completed jobs may take together, or None.
    """

    def __init__(self, jobs: Jobs, files: Files, runners: Sequence[Runner], most_bytes: int | None = None) -> None:
        super().__init__(jobs, files)
        self._runners, self._most_bytes = runners, most_bytes
        work = {one.name: partial(one.serve, self) for one in runners} | {"cleaner": self._clean}
        self._threads = [threading.Thread(target=self._guard, args=(do,), name=name) for name, do in work.items()]

    def start(self) -> None:
        """Begin. What ran when the server before this one ended runs again, unless its file is there already."""
        for job in self._jobs.running():
            made = self.files.made(job)
            if made.exists() and not job.cancel:  # it appears whole, and the row was to follow
                seconds = (job.stepped_at or time.time()) - (job.started_at or time.time())
                self._jobs.complete(job.id, seconds, made.stat().st_size)
            else:
                # An engine goes on meanwhile; only workers end with their server.
                at_engine = job.engine is not None
                self._jobs.put_back(job.id, counts=not at_engine, keep=at_engine)
        names = {runner.name for runner in self._runners}
        self._jobs.release([engine for engine in self._jobs.engines() if engine not in names])
        self.forget(self._jobs.left())
        # A first frame is written before its job is accepted, and what a cancelled one had is for nothing.
        self.files.sweep(lambda id: (job := self._jobs.get(id)) is not None and job.error_code != CANCELLED)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the steps that run end; their jobs wait for the next server."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            if not self.stopping.is_set():  # a fault: a server that takes jobs which nobody runs had better end
                log.critical("%s ended; the server ends, too", threading.current_thread().name, exc_info=True)
                os.kill(os.getpid(), signal.SIGTERM)

    def _clean(self) -> None:
        while True:
            gone = self._jobs.expired(time.time())
            if self._most_bytes is not None:
                gone += self._jobs.largest_kept(self._most_bytes)
            self.forget([*gone, *self._jobs.left()])
            if self.stopping.wait(CLEAN):
                return
