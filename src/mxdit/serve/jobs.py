"""Jobs in a SQLite file: the one place that knows what was asked for, what is done and what became of it.

Every method is one transaction, so that a process that is killed leaves each job as it was or as it is to be. All of them may
be called from any thread.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mxdit.errors import InputError
from mxdit.serve.job import CANCELLED, COMPLETED, FAILED, FORGET, QUEUED, RUNNING, STOP, Job

ATTEMPTS = 3  # a job that ended so many workers is not given to another one

# One entry a version of the file; entries are never changed, new ones are added.
MIGRATIONS = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        status TEXT NOT NULL,
        fields TEXT NOT NULL,
        image INTEGER NOT NULL,
        step INTEGER NOT NULL DEFAULT 0,
        steps INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        created_at REAL NOT NULL,
        started_at REAL,
        stepped_at REAL,
        completed_at REAL,
        expires_at REAL,
        error_code TEXT,
        error TEXT,
        seconds REAL,
        bytes INTEGER,
        media_type TEXT NOT NULL,
        cancel INTEGER NOT NULL DEFAULT 0,
        idempotency_key TEXT UNIQUE,
        digest TEXT
    ) STRICT;
    CREATE INDEX jobs_by_status ON jobs (status, number);
    CREATE INDEX jobs_by_expiry ON jobs (expires_at) WHERE expires_at IS NOT NULL;
    """,
    "ALTER TABLE jobs ADD COLUMN first_stepped_at REAL;",
    """
    ALTER TABLE jobs ADD COLUMN engine TEXT;
    ALTER TABLE jobs ADD COLUMN remote TEXT;
    """,
)


class Full(Exception):
    """The queue has as many jobs as it may have."""


class KeyReused(Exception):
    """An idempotency key came with another request."""


class Jobs:
    """The table.

    Args:
        file: of the database; made where there is none.
        keep: seconds for which an ended job is kept, or None for ever.
        most: jobs that may wait.
    """

    def __init__(self, file: Path, keep: float | None = None, most: int = 1000) -> None:
        self.keep, self.most = keep, most
        self._lock = threading.RLock()
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what was accepted survives a power cut, too
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            self._db.close()
            raise InputError(
                "a later version of mxdit made this",
                where=str(file),
                got=version,
                expected=f"at most {len(MIGRATIONS)}",
            )
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            self._db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._db:  # which commits, or rolls back what ended in an error
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def _all(self, query: str, *values: Any) -> list[Job]:
        with self._lock:
            rows = self._db.execute(f"SELECT * FROM jobs {query}", values).fetchall()
        return [_job(row) for row in rows]

    # -- what clients do -----------------------------------------------------------------------------------------------

    def add(
        self,
        id: str,
        model: str,
        fields: Mapping[str, Any],
        *,
        steps: int,
        media_type: str,
        image: bool = False,
        key: str | None = None,
        digest: str | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> Job:
        """Accept a job, or give the one that was accepted under the same idempotency key.

        Args:
            key, digest: of the request, where it has a key.
            before: called where the job is new, before it is accepted: writes what it needs.

        Raises Full, and KeyReused for the key of another request.
        """
        with self._writing() as db:
            if key is not None:
                known = db.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
                if known is not None and known["digest"] != digest:
                    raise KeyReused
                if known is not None:
                    return _job(known)
            (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE status = ?", (QUEUED,)).fetchone()
            if waiting >= self.most:
                raise Full
            before()
            db.execute(
                "INSERT INTO jobs (id, model, status, fields, image, steps, created_at, media_type, idempotency_key, digest)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (id, model, QUEUED, json.dumps(fields), image, steps, time.time(), media_type, key, digest),
            )
            return _job(db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone())

    def get(self, id: str, *, forgotten: bool = False) -> Job | None:
        """A job; one that is to be forgotten only where it is asked for."""
        found = self._all("WHERE id = ? AND cancel <= ?", id, FORGET if forgotten else STOP)
        return found[0] if found else None

    def page(self, limit: int, after: str | None = None, *, newest_first: bool = True) -> tuple[list[Job], bool]:
        """So many jobs behind the one called `after`, and whether there are more. Raises KeyError where there is no `after`."""
        start = None
        if after is not None:
            known = self.get(after)
            if known is None:
                raise KeyError(after)
            start = known.number
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        where = "" if start is None else f"AND number {beyond} {start}"
        found = self._all(f"WHERE cancel <= ? {where} ORDER BY number {order} LIMIT ?", STOP, limit + 1)
        return found[:limit], len(found) > limit

    def positions(self, jobs: Sequence[Job]) -> dict[str, int]:
        """How many jobs wait before each that waits, of one job or of a page: those between two of a page are in it."""
        waiting = sorted((job for job in jobs if job.status == QUEUED), key=lambda job: job.number)
        if not waiting:
            return {}
        with self._lock:
            (ahead,) = self._db.execute(
                "SELECT count(*) FROM jobs WHERE status = ? AND number < ?", (QUEUED, waiting[0].number)
            ).fetchone()
        return {job.id: ahead + place for place, job in enumerate(waiting)}

    def counts(self) -> dict[str, int]:
        """Status -> how many jobs have it."""
        with self._lock:
            rows = self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return {QUEUED: 0, RUNNING: 0, COMPLETED: 0, FAILED: 0} | dict(rows)

    def cancel(self, id: str, *, forget: bool = False) -> None:
        """End a job that waits; ask one that runs to stop, and, with `forget`, to leave nothing behind."""
        with self._writing() as db:
            asked = FORGET if forget else STOP
            db.execute("UPDATE jobs SET cancel = max(cancel, ?) WHERE id = ? AND status = ?", (asked, id, RUNNING))
            self._end(db, "status = ? AND id = ?", (QUEUED, id), FAILED, CANCELLED, "the job was cancelled")

    def remove(self, id: str) -> bool:
        """Forget a job that does not run. Whether it was there."""
        with self._writing() as db:
            return db.execute("DELETE FROM jobs WHERE id = ? AND status != ?", (id, RUNNING)).rowcount > 0

    # -- what workers do -----------------------------------------------------------------------------------------------

    def take(self, models: Collection[str], engine: str | None = None) -> Job | None:
        """The first job of these models that waits; it runs from now on, and this attempt counts.

        Args:
            engine: that asks: it gets what it has already first, and nothing that another one has.
        """
        names = ",".join("?" * len(models))
        first = (
            f"SELECT id FROM jobs WHERE status = ? AND model IN ({names}) AND (engine IS NULL OR engine IS ?)"
            " ORDER BY engine IS NULL, number LIMIT 1"
        )
        values = (QUEUED, *models, engine)
        with self._lock:
            if self._db.execute(first, values).fetchone() is None:
                return None  # and nobody was kept from writing
        with self._writing() as db:
            row = db.execute(first, values).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET status = ?, step = 0, attempts = attempts + 1, started_at = ?, stepped_at = NULL,"
                " first_stepped_at = NULL, engine = ? WHERE id = ?",
                (RUNNING, time.time(), engine, row["id"]),
            )
            return _job(db.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone())

    def sent(self, id: str, remote: str) -> None:
        """Note what the engine calls the job."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET remote = ? WHERE id = ? AND status = ?", (remote, id, RUNNING))

    def release(self, engines: Collection[str]) -> None:
        """Let waiting jobs go to other engines than these, which have them."""
        names = ",".join("?" * len(engines))
        with self._writing() as db:
            db.execute(
                f"UPDATE jobs SET engine = NULL, remote = NULL WHERE status = ? AND engine IN ({names})",
                (QUEUED, *engines),
            )

    def engines(self) -> set[str]:
        """Those that have jobs which wait."""
        with self._lock:
            rows = self._db.execute(
                "SELECT DISTINCT engine FROM jobs WHERE status = ? AND engine IS NOT NULL", (QUEUED,)
            ).fetchall()
        return {row["engine"] for row in rows}

    def stepped(self, id: str, step: int, steps: int | None = None) -> None:
        """Note that so many steps are done, and how many there are where that was unknown."""
        with self._writing() as db:
            db.execute(
                "UPDATE jobs SET step = ?1, steps = coalesce(?2, steps), stepped_at = ?3,"
                " first_stepped_at = coalesce(first_stepped_at, ?3) WHERE id = ?4 AND status = ?5",
                (step, steps, time.time(), id, RUNNING),
            )

    def complete(self, id: str, seconds: float, size: int, fields: Mapping[str, Any] | None = None) -> None:
        """A run ended well; its file is where it belongs. `fields` are those of the job as they are now known."""
        with self._writing() as db:
            if fields is not None:
                db.execute("UPDATE jobs SET fields = ? WHERE id = ? AND status = ?", (json.dumps(fields), id, RUNNING))
            self._end(db, "status = ? AND id = ?", (RUNNING, id), COMPLETED, None, None, seconds, size)

    def fail(self, id: str, code: str, message: str) -> None:
        """A run ended badly, for good."""
        with self._writing() as db:
            self._end(db, "status = ? AND id = ?", (RUNNING, id), FAILED, code, message)

    def put_back(
        self, id: str, *, counts: bool = True, keep: bool = False, because: tuple[str, str] | None = None
    ) -> None:
        """Let a job that ran wait again; one that had its last attempt has failed.

        Args:
            counts: whether the attempt did: not where the server itself asked for the end.
            keep: whether its engine still has it.
            because: code and message of a job that had its last attempt.
        """
        which, values = "status = ? AND id = ?", (RUNNING, id)
        with self._writing() as db:
            self._end(db, f"{which} AND cancel > 0", values, FAILED, CANCELLED, "the job was cancelled")
            if counts:
                code, reason = because or ("worker_died", "the worker ended before the job did")
                reason = f"{reason}, {ATTEMPTS} times"
                self._end(db, f"{which} AND attempts >= {ATTEMPTS}", values, FAILED, code, reason)
            kept = "" if keep else ", engine = NULL, remote = NULL"
            db.execute(
                "UPDATE jobs SET status = ?, step = 0, started_at = NULL, stepped_at = NULL, first_stepped_at = NULL,"
                f" attempts = attempts - ?{kept} WHERE {which}",
                (QUEUED, 0 if counts else 1, *values),
            )

    def expired(self, now: float) -> list[Job]:
        """Ended jobs whose time is up."""
        return self._all("WHERE expires_at <= ?", now)

    def largest_kept(self, most: int) -> list[Job]:
        """The oldest completed jobs, as many as have to go so that the files of the rest take at most so many bytes."""
        gone, total = [], 0
        for job in self._all("WHERE status = ? AND bytes IS NOT NULL ORDER BY number DESC", COMPLETED):
            total += job.bytes or 0
            if total > most:
                gone.append(job)
        return gone

    def _end(
        self,
        db: sqlite3.Connection,
        which: str,
        values: tuple[Any, ...],
        status: str,
        code: str | None,
        message: str | None,
        seconds: float | None = None,
        size: int | None = None,
    ) -> None:
        now = time.time()
        expires = None if self.keep is None else now + self.keep
        db.execute(
            "UPDATE jobs SET status = ?, error_code = ?, error = ?, completed_at = ?, expires_at = ?, seconds = ?, bytes = ?"
            f" WHERE {which}",
            (status, code, message, now, expires, seconds, size, *values),
        )

    def running(self) -> list[Job]:
        return self._all("WHERE status = ?", RUNNING)

    def left(self) -> list[Job]:
        """Ended jobs that are to be forgotten."""
        return self._all("WHERE cancel = ? AND status != ?", FORGET, RUNNING)


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    return Job(**{**values, "fields": json.loads(row["fields"]), "image": bool(row["image"])})
