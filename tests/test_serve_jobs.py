"""The table of jobs: what is accepted is kept, each in the state that it was left in, whoever is killed."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mxdit.errors import InputError
from mxdit.serve.job import COMPLETED, FAILED, QUEUED, RUNNING, Job
from mxdit.serve.jobs import ATTEMPTS, MIGRATIONS, Full, Jobs, KeyReused
from mxdit.serve.lock import only_one

MODELS = {"a": None, "b": None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def add(jobs: Jobs, id: str, model: str = "a", **more: Any) -> Job:
    return jobs.add(id, model, {"prompt": id}, steps=4, media_type="video/mp4", **more)


def test_a_job_from_the_queue_to_its_end(file):
    jobs = Jobs(file, keep=100)
    made = add(jobs, "x", image=True)
    assert (made.status, made.step, made.attempts, made.image, made.fields) == (QUEUED, 0, 0, True, {"prompt": "x"})
    taken = jobs.take(MODELS)
    assert taken is not None and (taken.id, taken.status, taken.attempts) == ("x", RUNNING, 1)
    assert jobs.take(MODELS) is None
    jobs.stepped("x", 3)
    assert Jobs(file).get("x").step == 3  # as another process sees it
    jobs.complete("x", 1.5, 99)
    done = jobs.get("x")
    assert (done.status, done.seconds, done.bytes, done.ended) == (COMPLETED, 1.5, 99, True)
    assert done.expires_at == pytest.approx(done.completed_at + 100)
    assert jobs.expired(time.time()) == [] and jobs.expired(time.time() + 101) == [done]
    jobs.fail("x", "late", "news of an attempt that is over")
    assert jobs.get("x") == done


def test_the_first_that_was_accepted_runs_first_of_the_models_that_a_worker_has(file):
    jobs = Jobs(file)
    for id, model in (("1", "b"), ("2", "a"), ("3", "b")):
        add(jobs, id, model)
    assert [jobs.positions([jobs.get(id)]) for id in "123"] == [{"1": 0}, {"2": 1}, {"3": 2}]
    assert jobs.positions(jobs.page(2)[0]) == {"2": 1, "3": 2}
    assert jobs.take({"a": None}).id == "2"
    assert jobs.positions([jobs.get("2")]) == {} and jobs.positions(jobs.page(3)[0]) == {"1": 0, "3": 1}
    assert [jobs.take(MODELS).id, jobs.take(MODELS).id] == ["1", "3"]


def test_a_job_that_ended_three_workers_has_failed(file):
    jobs = Jobs(file)
    add(jobs, "x")
    for attempt in range(1, ATTEMPTS + 1):
        assert jobs.take(MODELS).attempts == attempt
        jobs.stepped("x", 2)
        jobs.put_back("x")
        assert jobs.get("x").status == (QUEUED if attempt < ATTEMPTS else FAILED)
    lost = jobs.get("x")
    assert lost.error_code == "worker_died" and "3 times" in lost.error


def test_an_attempt_that_the_server_ended_does_not_count(file):
    jobs = Jobs(file)
    add(jobs, "x")
    for _ in range(2 * ATTEMPTS):
        assert jobs.take(MODELS).attempts == 1
        jobs.put_back("x", counts=False)
    waiting = jobs.get("x")
    assert (waiting.status, waiting.step, waiting.attempts, waiting.started_at) == (QUEUED, 0, 0, None)


def test_all_that_ran_wait_again_when_a_server_begins(file):
    before = Jobs(file)
    for id in "123":
        add(before, id)
    before.take(MODELS), before.take(MODELS)
    before.complete("1", 1, 1)
    after = Jobs(file)  # nobody closed the first
    for job in after.running():
        after.put_back(job.id)
    assert [after.get(id).status for id in "123"] == [COMPLETED, QUEUED, QUEUED]
    assert after.take(MODELS).id == "2"


def test_cancelling(file):
    jobs = Jobs(file)
    for id in "12":
        add(jobs, id)
    running = jobs.take(MODELS)
    for id in "12":
        jobs.cancel(id)
    assert jobs.get("2").error_code == "cancelled" and jobs.get("2").status == FAILED
    assert jobs.get(running.id).cancel and jobs.get(running.id).status == RUNNING
    jobs.put_back(running.id)  # its worker died before it could stop
    assert jobs.get(running.id).error_code == "cancelled"
    jobs.cancel("1", forget=True)  # too late, and no matter
    assert jobs.get("1").cancel == 1


def test_what_is_to_be_forgotten_is_not_shown_while_it_still_runs(file):
    jobs = Jobs(file)
    add(jobs, "x")
    jobs.take(MODELS)
    assert not jobs.remove("x")
    jobs.cancel("x", forget=True)
    jobs.cancel("x")  # does not take it back
    assert jobs.get("x") is None and jobs.page(10) == ([], False) and jobs.left() == []
    assert jobs.get("x", forgotten=True).status == RUNNING
    jobs.fail("x", "cancelled", "")
    assert [job.id for job in jobs.left()] == ["x"] and jobs.remove("x") and jobs.left() == []


def test_a_key_gives_one_job_and_never_another_requests(file):
    jobs, written = Jobs(file), []
    first = add(jobs, "1", key="k", digest="d", before=lambda: written.append(1))
    assert add(jobs, "2", key="k", digest="d", before=lambda: written.append(2)) == first and written == [1]
    with pytest.raises(KeyReused):
        add(jobs, "3", key="k", digest="e")
    assert jobs.counts()[QUEUED] == 1


def test_a_full_queue_takes_no_more_and_nothing_is_written(file):
    jobs, written = Jobs(file, most=2), []
    add(jobs, "1"), add(jobs, "2")
    with pytest.raises(Full):
        add(jobs, "3", before=lambda: written.append(3))
    jobs.take(MODELS)
    add(jobs, "3")
    assert written == []


def test_a_first_frame_that_cannot_be_written_is_no_job(file):
    jobs = Jobs(file)

    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        add(jobs, "x", before=full)
    assert jobs.get("x") is None
    add(jobs, "x")  # and the table is not locked


def test_pages(file):
    jobs = Jobs(file)
    for number in range(5):
        add(jobs, str(number))
    newest, more = jobs.page(2)
    assert [job.id for job in newest] == ["4", "3"] and more
    assert [job.id for job in jobs.page(2, "3")[0]] == ["2", "1"]
    rest, more = jobs.page(2, "1")
    assert [job.id for job in rest] == ["0"] and not more
    assert [job.id for job in jobs.page(9, "2", newest_first=False)[0]] == ["3", "4"]
    with pytest.raises(KeyError):
        jobs.page(2, "x")


def test_the_oldest_files_go_where_all_take_too_much(file):
    jobs = Jobs(file)
    for id in "1234":
        add(jobs, id)
        jobs.take(MODELS)
        jobs.complete(id, 1, 100)
    assert [job.id for job in jobs.largest_kept(250)] == ["2", "1"] and jobs.largest_kept(400) == []


def test_each_job_is_taken_once_by_many(file):
    jobs = Jobs(file)
    for number in range(60):
        add(jobs, str(number))
    taken: list[str] = []

    def take() -> None:
        while (job := jobs.take(MODELS)) is not None:
            taken.append(job.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken, key=int) == [str(number) for number in range(60)]


def test_what_is_left_of_a_run_counts_from_the_end_of_its_first_step(file, monkeypatch):
    """With which the model was loaded: 100 s here, and 2 s for each step after it."""
    jobs, now = Jobs(file), [1000.0]
    monkeypatch.setattr("mxdit.serve.jobs.time.time", lambda: now[0])
    add(jobs, "x")
    for _ in range(2):  # the second run knows nothing of the first one's times
        jobs.take(MODELS)
        assert jobs.get("x").eta is None
        now[0] += 100
        jobs.stepped("x", 1)
        assert jobs.get("x").eta is None
        now[0] += 2
        jobs.stepped("x", 2)
        assert jobs.get("x").eta == 4
        jobs.put_back("x")
    jobs.take(MODELS)
    jobs.stepped("x", 2)
    jobs.complete("x", 1.0, 1)
    assert jobs.get("x").eta is None


def test_a_file_of_an_earlier_version_is_brought_up_to_date(file):
    with sqlite3.connect(file) as old:
        old.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        old.execute(
            "INSERT INTO jobs (id, model, status, fields, image, steps, created_at, media_type)"
            " VALUES ('x', 'a', 'queued', '{}', 0, 4, 1.0, 'video/mp4')"
        )
    old.close()
    jobs = Jobs(file)
    assert jobs.take(MODELS).id == "x" and jobs.get("x").eta is None


def test_a_file_of_a_later_version_is_left_alone(file):
    Jobs(file).close()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="got 99"):
        Jobs(file)


def test_a_directory_has_one_server_at_a_time(tmp_path):
    data = tmp_path / "data"
    with only_one(data), pytest.raises(InputError, match="another server has this directory"), only_one(data):
        pass
    with only_one(tmp_path / "data"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), only_one(tmp_path / "file" / "data"):
        pass
