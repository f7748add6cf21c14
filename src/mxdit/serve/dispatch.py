"""`Dispatcher`: workers, one process a device, and a thread for each that gives it jobs and writes down what it tells."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mxdit.checkpoint.writer import sync, write_synced
from mxdit.serve.jobs import CANCELLED, Job, Jobs
from mxdit.serve.served import Served
from mxdit.serve.worker import Done, Ended, Loaded, Stepped, Task, main

log = logging.getLogger(__name__)

LOOK = 0.02  # seconds between two looks for a job, for a cancelled one, and for the end
CLEAN = 60.0  # seconds between two looks for what has expired
GRACE = 60.0  # seconds that a worker has to end its step when the server stops
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


class Dispatcher:
    """Gives jobs to workers until it is stopped.

    Args:
        jobs, files: what there is to do, and where it goes.
        served: the models, by id.
        devices: names of torch devices; each gets a worker.
        most_bytes: that the files of completed jobs may take together, or None.

    Attributes:
        told: called, from any thread, when a job has changed.
    """

    def __init__(
        self,
        jobs: Jobs,
        files: Files,
        served: Mapping[str, Served],
        devices: Sequence[str],
        most_bytes: int | None = None,
    ) -> None:
        self._jobs, self._files, self._served, self._most_bytes = jobs, files, served, most_bytes
        self.told: Callable[[], object] = lambda: None
        self.linears: dict[str, Mapping[str, Mapping[str, int]]] = {}  # of the models that were loaded so far
        self.step_seconds: dict[str, float] = {}  # model -> how long its last step took
        self.ready = threading.Event()  # once a worker has loaded its first model
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._serve, args=(d,), name=f"worker {d}") for d in devices]
        self._threads.append(threading.Thread(target=self._clean, name="cleaner"))

    def start(self) -> None:
        """Begin. What ran when the server before this one ended runs again, unless its file is there already."""
        for job in self._jobs.running():
            made = self._files.made(job)
            if made.exists() and not job.cancel:  # it appears whole, and the row was to follow
                seconds = (job.stepped_at or time.time()) - (job.started_at or time.time())
                self._jobs.complete(job.id, seconds, made.stat().st_size)
        self._jobs.put_back()
        self._forget(self._jobs.left())
        # A first frame is written before its job is accepted, and what a cancelled one had is for nothing.
        self._files.sweep(lambda id: (job := self._jobs.get(id)) is not None and job.error_code != CANCELLED)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the steps that run end; their jobs wait for the next server."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    # -- one worker ----------------------------------------------------------------------------------------------------

    def _serve(self, device: str) -> None:
        context, failures = get_context("spawn"), 0
        while not self._stopping.is_set():
            ours, theirs = context.Pipe()
            warm = next(iter(self._served), None)
            process = context.Process(target=main, args=(theirs, dict(self._served), device, warm), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            try:
                while self._one(ours, process):
                    failures = 0
            except (EOFError, OSError):
                failures += 1
                log.error("the worker of %s ended with exit code %s", device, _code(process))
            finally:
                ours.close()
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()
            self._stopping.wait(min(30.0, 0.1 * 2**failures) if failures else 0)

    def _one(self, pipe: Connection, process: BaseProcess) -> bool:
        """Wait for a job and see it through. False where the server stops; raises EOFError where the worker ended."""
        while (job := None if self._stopping.is_set() else self._jobs.take(self._served)) is None:
            if self._stopping.wait(0):
                return False
            if pipe.poll(LOOK):
                self._note(pipe.recv())
        self.told()
        try:
            return self._see_through(job, pipe)
        except (EOFError, OSError):
            self._files.unfinished(job).unlink(missing_ok=True)
            self._jobs.put_back(job.id)
            self.told()
            raise

    def _see_through(self, job: Job, pipe: Connection) -> bool:
        image = self._files.given(job.id) if job.image else None
        pipe.send(Task(job.id, job.model, job.fields, image, self._files.unfinished(job)))
        asked, last = 0.0, time.monotonic()
        while True:
            if not asked and (self._stopping.is_set() or self._cancelled(job.id)):
                pipe.send(None)
                asked = time.monotonic()
            if self._stopping.is_set() and asked and time.monotonic() - asked > GRACE:
                self._put_back(job)
                return False
            if not pipe.poll(LOOK):
                continue
            told = pipe.recv()
            if isinstance(told, Stepped):
                now = time.monotonic()
                self.step_seconds[job.model], last = now - last, now
                self._jobs.stepped(job.id, told.step)
                self.told()
            elif isinstance(told, Done):
                if self._cancelled(job.id):  # while it was encoded
                    self._end(job, CANCELLED, "the job was cancelled")
                else:
                    self._jobs.complete(job.id, told.seconds, self._files.finish(job))
                self.told()
                return True
            elif isinstance(told, Ended):
                if told.code == CANCELLED and not self._cancelled(job.id):  # it was the server that stopped it
                    self._put_back(job)
                    return False
                self._end(job, told.code, told.message)
                return True
            else:
                self._note(told)

    def _cancelled(self, id: str) -> bool:
        job = self._jobs.get(id, forgotten=True)
        return job is None or job.cancel > 0

    def _end(self, job: Job, code: str, message: str) -> None:
        self._files.unfinished(job).unlink(missing_ok=True)
        if code == CANCELLED:
            self._files.given(job.id).unlink(missing_ok=True)
        self._jobs.fail(job.id, code, message)
        self._forget(self._jobs.left())
        self.told()

    def _put_back(self, job: Job) -> None:
        self._files.unfinished(job).unlink(missing_ok=True)
        self._jobs.put_back(job.id, counts=False)

    def _note(self, told: Any) -> None:
        if isinstance(told, Loaded):
            self.linears[told.model] = told.linears
            self.ready.set()

    # -- what has expired ----------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        while True:
            gone = self._jobs.expired(time.time())
            if self._most_bytes is not None:
                gone += self._jobs.largest_kept(self._most_bytes)
            self._forget([*gone, *self._jobs.left()])
            if self._stopping.wait(CLEAN):
                return

    def _forget(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._jobs.remove(job.id):
                self._files.remove(job)


def _code(process: BaseProcess) -> int | None:
    process.join(1)
    return process.exitcode
