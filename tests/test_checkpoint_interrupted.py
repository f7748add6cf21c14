"""Runs that do not end: killed at any point, without room, two at once. What is there afterwards is nothing or all of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as library

import processes
import tiny
from mxdit import cli
from mxdit.checkpoint import CheckpointPlan, quantize_checkpoint
from mxdit.checkpoint.writer import PLAN, new_directory
from mxdit.errors import CheckpointError, InputError
from safefiles import contents

pytestmark = pytest.mark.slow

SHARD = 60_000  # some five shards an expert
KILLS = 20


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run that nothing interrupts writes."""
    destination = tmp_path_factory.mktemp("whole") / "out"
    plan_of(source, destination).write()
    return contents(destination)


def plan_of(source: Path, destination: Path) -> CheckpointPlan:
    return quantize_checkpoint(source, destination, "mxfp4_dualscale", shard_size=SHARD)


def finished(directory: Path) -> dict[str, int]:
    """The whole shards in an unfinished directory: path inside -> inode."""
    partial = directory.parent / f".{directory.name}.partial"
    return {str(p.relative_to(partial)): p.stat().st_ino for p in partial.rglob("diffusion_pytorch_model*.safetensors")}


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# -- killed ------------------------------------------------------------------------------------------------------------


def killed_at(plan: CheckpointPlan, nbytes: int) -> None:
    """Write, and die in the middle of it, after so many bytes."""
    plan.write(lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done >= nbytes else None)


@pytest.mark.slow
def test_killed_after_any_number_of_bytes(source, whole, tmp_path):
    out = tmp_path / "out"
    plan = plan_of(source, out)
    shards = sum(len(component.shards) for component in plan.components)
    numbers = random.Random(0)
    resumed = 0
    for count in range(KILLS):
        process = processes.start(tmp_path / "log", killed_at, plan, numbers.randrange(plan.nbytes))
        assert processes.code_of(process) == -signal.SIGKILL
        assert entries(tmp_path) == [".out.partial", "log"]  # nothing that loads, nothing else
        before = finished(out)
        steps: list[int] = []
        plan_of(source, out).write(lambda done, total, steps=steps: steps.append(done))
        assert contents(out) == whole, count
        assert entries(tmp_path) == ["log", "out"]
        kept = {name for name, inode in before.items() if (out / name).stat().st_ino == inode}
        assert kept == before.keys() and len(before) < shards  # finished shards are not made again
        resumed += bool(kept)
        shutil.rmtree(out)
    assert KILLS / 2 < resumed <= KILLS


@pytest.mark.slow
def test_killed_at_any_time_again_and_again(source, whole, tmp_path):
    """From outside, wherever it is: between tensors or within one, before the first or after the last."""
    out = tmp_path / "out"
    started = time.monotonic()
    assert processes.run(tmp_path / "log", plan_of(source, out).write) == (0, "")
    seconds = time.monotonic() - started
    shutil.rmtree(out)
    numbers = random.Random(1)
    ends: list[int | None] = []
    while ends.count(-signal.SIGKILL) < KILLS:
        assert len(ends) < 20 * KILLS
        process = processes.start(tmp_path / "log", plan_of(source, out).write)
        time.sleep(numbers.random() * seconds)
        process.kill()
        ends.append(processes.code_of(process))
        if out.exists():
            assert contents(out) == whole and entries(tmp_path) == ["log", "out"]
            shutil.rmtree(out)
        else:
            assert set(entries(tmp_path)) <= {".out.partial", "log"}
    plan_of(source, out).write()
    assert contents(out) == whole and entries(tmp_path) == ["log", "out"]


def test_killed_and_the_source_changes(source, tmp_path):
    model, out = shutil.copytree(source, tmp_path / "model"), tmp_path / "out"
    plan = plan_of(model, out)
    process = processes.start(tmp_path / "log", killed_at, plan, plan.nbytes * 3 // 4)
    assert processes.code_of(process) == -signal.SIGKILL and finished(out)
    tiny.transformer(seed=99).bfloat16().save_pretrained(model / "transformer")  # the same names, shapes and sizes
    plan_of(model, tmp_path / "expected").write()
    plan_of(model, out).write()
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 1000), lambda path: path.write_bytes(b"")])
def test_killed_and_what_it_left_is_damaged(source, whole, tmp_path, damage):
    out = tmp_path / "out"
    plan = plan_of(source, out)
    processes.code_of(processes.start(tmp_path / "log", killed_at, plan, plan.nbytes * 3 // 4))
    for name in list(finished(out))[::2]:
        damage(tmp_path / ".out.partial" / name)
    plan.write()
    assert contents(out) == whole


# -- no room -----------------------------------------------------------------------------------------------------------


def command(source: Path, out: Path, *args: str) -> None:
    sys.argv = ["mxdit", "quantize", str(source), str(out), "--method", "mxfp4_dualscale", *args]
    cli.main()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, whole, tmp_path):
    """A limit on file sizes stands for the full disk: the write fails in the middle of a shard."""
    out = tmp_path / "out"
    sizes = [len(data) for name, data in whole.items() if name.startswith("transformer") and name.endswith("rs")]
    biggest = max(sizes)
    assert sizes.index(biggest) > 0  # shards before it fit

    def limited() -> None:
        processes.limit_file_size(biggest - 1)
        command(source, out, "--shard-size", str(SHARD))

    code, said = processes.run(tmp_path / "log", limited)
    lines = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said
    assert f"{out}: the disk is full; got File too large" in lines[0] and "it goes on from" in lines[0]
    assert entries(tmp_path) == [".out.partial", "log"]
    before = finished(out)
    assert len(before) == sizes.index(biggest) and not list((tmp_path / ".out.partial").rglob("*.tmp"))

    code, said = processes.run(tmp_path / "log", command, source, out, "--shard-size", str(SHARD))
    assert code == 0 and "written" in said
    assert contents(out) == whole and entries(tmp_path) == ["log", "out"]
    assert all((out / name).stat().st_ino == inode for name, inode in before.items())


def test_a_disk_full_from_the_start(source, whole, tmp_path):
    def limited() -> None:
        processes.limit_file_size(10_000)  # room for what it says, and for no shard
        command(source, tmp_path / "out")

    code, said = processes.run(tmp_path / "log", limited)
    assert code == 2 and "the disk is full" in said and "it goes on from" not in said
    assert entries(tmp_path) == ["log"]


@pytest.mark.parametrize("copy", [False, True])
def test_room_is_asked_for_before_the_first_byte(source, whole, tmp_path, monkeypatch, copy):
    plan = plan_of(source, tmp_path / "out")
    carried = sum(path.stat().st_size for path in plan.carried.values())
    free = plan.nbytes + carried * copy - 1
    usage: Callable[[Any], Any] = lambda path: shutil._ntuple_diskusage(1 << 40, 0, free)  # type: ignore[attr-defined]  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        CheckpointError, match=rf"the disk is full; got {free + 1} bytes are to be written and {free} are"
    ):
        plan.write(lambda done, total: pytest.fail("something was written"), copy=copy)
    assert not list(tmp_path.iterdir())
    free += 1
    plan.write(copy=copy)
    assert contents(tmp_path / "out") == whole


def test_room_is_needed_only_for_what_is_still_to_be_written(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plan = plan_of(source, out)
    processes.code_of(processes.start(tmp_path / "log", killed_at, plan, plan.nbytes * 3 // 4))
    held = sum(shard.nbytes for e in plan.components for shard in e.shards if e.inside(shard.name) in finished(out))
    assert held > plan.nbytes / 2
    for free, enough in ((plan.nbytes - held - 1, False), (plan.nbytes - held, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))  # type: ignore[attr-defined]
        if enough:
            plan.write()
        else:
            with pytest.raises(CheckpointError, match="it goes on from"):
                plan.write()
            assert finished(out)  # what is there is kept
    assert contents(out) == whole


# -- other trouble -----------------------------------------------------------------------------------------------------


def test_another_process_is_kept_out(source, whole, tmp_path):
    out = tmp_path / "out"
    pipe, go = os.pipe(), os.pipe()

    def slow() -> None:
        steps: list[int] = []

        def wait(done: int, total: int) -> None:
            steps.append(done)
            if len(steps) == 5:
                os.write(pipe[1], b"x")
                os.read(go[0], 1)

        plan_of(source, out).write(wait)

    process = processes.start(tmp_path / "log", slow)
    os.read(pipe[0], 1)  # it is in the middle now
    before = contents(tmp_path / ".out.partial")
    with pytest.raises(InputError, match="another process is writing this"):
        plan_of(source, out).write()
    assert contents(tmp_path / ".out.partial") == before and not out.exists()
    os.write(go[1], b"x")
    assert processes.code_of(process) == 0 and contents(out) == whole


def test_the_other_process_ends_while_this_one_looks(tmp_path, monkeypatch):
    """It renames the hidden directory between our opening and our locking of it."""
    real = os.open

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = real(path, *args, **kwargs)
        if str(path).endswith(".out.partial"):
            Path(path).rename(tmp_path / "out")
        return handle

    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "made").write_text("by another")
    monkeypatch.setattr(os, "open", late)
    with pytest.raises(InputError, match="another process is writing this"), new_directory(tmp_path / "out", "plan"):
        pytest.fail("it is not ours")
    assert contents(tmp_path / "out") == {"made": b"by another"} and entries(tmp_path) == ["out"]


def test_what_the_file_system_refuses_is_one_clear_error(source, whole, tmp_path):
    with pytest.raises(InputError, match="/proc/out: the destination cannot be made; got "):
        plan_of(source, Path("/proc/out")).write()
    with pytest.raises(InputError, match="File name too long"):
        plan_of(source, tmp_path / ("x" * 250)).write()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        plan_of(source, tmp_path / "file" / "out").write()
    (tmp_path / ".out.partial").symlink_to(source)  # nothing of what it leads to is removed
    before = contents(source)
    with pytest.raises(InputError, match="the destination cannot be made"):
        plan_of(source, tmp_path / "out").write()
    assert contents(source) == before
    (tmp_path / ".out.partial").unlink()

    blocked = tmp_path / ".out.partial" / "transformer_2"
    with pytest.raises(
        CheckpointError, match=r"the checkpoint cannot be written; got .*transformer_2.*it goes on from"
    ):
        plan_of(source, tmp_path / "out").write(lambda done, total: blocked.exists() or blocked.write_text("x"))
    blocked.unlink()
    plan_of(source, tmp_path / "out").write()
    assert contents(tmp_path / "out") == whole


def test_a_fault_found_on_the_way_leaves_nothing(source, tmp_path):
    model = shutil.copytree(source, tmp_path / "model")
    file = model / "transformer_2" / tiny.WEIGHTS
    tensors = library.load_file(file)
    tensors["blocks.1.ffn.net.2.weight"][3, 4] = float("nan")
    library.save_file(tensors, file)
    steps: list[int] = []
    with pytest.raises(Exception, match=r"blocks\.1\.ffn\.net\.2\.weight: the weight holds what .*got 1 infs or NaNs"):
        plan_of(model, tmp_path / "out").write(lambda done, total: steps.append(done))
    assert len(steps) > 50 and entries(tmp_path) == ["model"]


def test_a_leftover_of_another_plan_is_removed(source, whole, tmp_path):
    (tmp_path / ".out.partial" / "transformer").mkdir(parents=True)
    (tmp_path / ".out.partial" / "transformer" / "old.safetensors").write_text("of another plan")
    (tmp_path / ".out.partial" / "link").symlink_to(source)
    (tmp_path / ".out.partial" / PLAN).write_text("another plan")
    plan_of(source, tmp_path / "out").write()
    assert contents(tmp_path / "out") == whole
