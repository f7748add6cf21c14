"""`DeviceRunner`: a worker process on a device, given jobs, and what it tells written down."""

from __future__ import annotations

import logging
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from mxdit.serve.dispatch import GRACE, LOOK, Desk
from mxdit.serve.job import CANCELLED, Job
from mxdit.serve.served import Catalog
from mxdit.serve.worker import Done, Ended, Loaded, Stepped, Task, Unplanned, main

log = logging.getLogger(__name__)


class DeviceRunner:
    """Runs jobs of the catalog's models on one torch device, in a process of its own, one after the other."""

    def __init__(self, catalog: Catalog, device: str) -> None:
        self._catalog, self._device = catalog, device
        self.name = device

    def serve(self, desk: Desk) -> None:
        context, failures, served = get_context("spawn"), 0, dict(self._catalog.served)
        while not desk.stopping.is_set():
            ours, theirs = context.Pipe()
            warm = next(iter(served), None)
            told = (theirs, served, self._device, warm, self._catalog.shelf, logging.getLogger().getEffectiveLevel())
            process = context.Process(target=main, args=told, daemon=True)
            process.start()
            desk.workers[self.name] = process.pid or 0
            theirs.close()  # so that its end is seen here
            try:
                while self._one(desk, ours):
                    failures = 0
            except (EOFError, OSError):
                failures += 1
                log.error("the worker of %s ended with exit code %s", self._device, _code(process))
            finally:
                desk.workers.pop(self.name, None)
                ours.close()
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()
            desk.stopping.wait(min(30.0, 0.1 * 2**failures) if failures else 0)

    def _one(self, desk: Desk, pipe: Connection) -> bool:
        """Wait for a job and see it through. False where the server stops; raises EOFError where the worker ended."""
        while (job := None if desk.stopping.is_set() else desk.take(self._catalog.served)) is None:
            if desk.stopping.wait(0):
                return False
            if pipe.poll(LOOK):
                self._note(desk, pipe.recv())
        try:
            return self._see_through(desk, job, pipe)
        except (EOFError, OSError):
            desk.put_back(job)
            raise

    def _see_through(self, desk: Desk, job: Job, pipe: Connection) -> bool:
        image = desk.files.given(job.id) if job.image else None
        pipe.send(Task(job.id, job.model, job.fields, image, desk.files.unfinished(job)))
        asked, last = 0.0, 0.0
        while True:
            if not asked and (desk.stopping.is_set() or desk.cancelled(job)):
                pipe.send(None)
                asked = time.monotonic()
            if desk.stopping.is_set() and asked and time.monotonic() - asked > GRACE:
                desk.put_back(job, counts=False)
                return False
            if not pipe.poll(LOOK):
                continue
            told = pipe.recv()
            if isinstance(told, Stepped):
                now = time.monotonic()
                if last:
                    desk.step_seconds.labels(job.model).observe(now - last)
                last = now
                desk.stepped(job, told.step)
            elif isinstance(told, Done):
                if told.peak_bytes is not None:
                    desk.peak_bytes[self.name] = told.peak_bytes
                if desk.cancelled(job):  # while it was encoded
                    desk.end(job, CANCELLED, "the job was cancelled")
                else:
                    desk.complete(job, told.seconds)
                return True
            elif isinstance(told, Ended):
                if told.code == CANCELLED and not desk.cancelled(job):  # it was the server that stopped it
                    desk.put_back(job, counts=False)
                    return False
                desk.end(job, told.code, told.message)
                return True
            else:
                self._note(desk, told)

    def _note(self, desk: Desk, told: Any) -> None:
        if isinstance(told, Loaded):
            self._catalog.linears[told.model] = told.linears
            desk.ready.set()
        elif isinstance(told, Unplanned):  # a balancer that waits for a model would never send a job
            desk.ready.set()


def _code(process: BaseProcess) -> int | None:
    process.join(1)
    return process.exitcode
