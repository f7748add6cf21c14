"""`mxdit calibrate` killed by the system, which leaves it no time to tidy up: what is there afterwards, and what the same command
then comes to. Each run here has a cache of its own, or a copy, so equal bytes also say that the seed alone decides."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mxdit
import processes
import tiny
from mxdit import cli
from mxdit.errors import MXDiTError
from safefiles import contents

pytestmark = pytest.mark.slow

GROUPS = 2 * tiny.BLOCKS * 7  # of linears that share an input, in both transformers
KILLED = GROUPS // 2 + 4  # the second transformer is in the middle of its linears
SMALL = ["--size", "16x16", "--frames", "1", "--steps", "2", "--keep", "10%", "--step-budget", "50%", "--held", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "prompts.txt").write_text("\n".join(f"a {color} seven" for color in ("red", "blue", "green", "on", "left")))
    return tiny.save(root / "t2v")


def arguments(model: Path, root: Path) -> list[str]:
    # Whether so small a calibration is accepted is by chance, and not the matter here.
    prompts = ["--prompts", str(model.parent / "prompts.txt")]
    return ["calibrate", str(model), str(root / "made"), "--cache", str(root / "cache"), "--force", *SMALL, *prompts]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint and cache of a run that nothing interrupts, in this process and with its seed of hashes."""
    root = tmp_path_factory.mktemp("whole")
    calibrate(model, root)
    return root


def calibrate(model: Path, root: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(sys, "argv", ["mxdit", *arguments(model, root)])
        cli.main()


def calibrated(root: Path) -> dict[str, int]:
    """The groups of linears in a cache: entry -> when it was made."""
    found = (root / "cache").glob("[!.]*/parts.safetensors")
    return {file.parent.name: file.stat().st_mtime_ns for file in found}


def test_killed_among_the_linears(model, whole, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "mxdit.cli", *arguments(model, tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONHASHSEED": "2"})
        end = time.monotonic() + 5 * processes.TIMEOUT
        while len(calibrated(tmp_path)) < KILLED and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)  # the groups appear as files, of which nothing tells another process
        running = process.poll() is None
        process.kill()
        assert running and len(calibrated(tmp_path)) >= KILLED, (tmp_path / "log").read_text()
        assert process.wait() == -signal.SIGKILL
    before = calibrated(tmp_path)
    assert KILLED <= len(before) < GROUPS and not (tmp_path / "made").exists()
    assert len(list((tmp_path / "cache").glob(".*"))) <= 1  # what it was at: that alone is done twice

    calibrate(model, tmp_path)
    after = calibrated(tmp_path)
    assert before.items() <= after.items() and after.keys() == calibrated(whole).keys() and len(after) == GROUPS
    assert contents(tmp_path / "made") == contents(whole / "made")
    config = json.loads((whole / "made" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"  # unless told otherwise


# Not forked from here: torch sends no gradients back in a fork of a process that has done so.
KILLED_WHILE_WRITING = """
import os, signal, sys
from mxdit import cli
from mxdit.cli.progress import Shown

def progress(shown, what, done, total):
    if what == "writing" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

Shown.progress = progress
cli.main()
"""


def test_killed_while_the_checkpoint_is_written(model, whole, tmp_path):
    shutil.copytree(whole / "cache", tmp_path / "cache")
    done = processes.python("-c", KILLED_WHILE_WRITING, *arguments(model, tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.partial", "cache"]
    assert list((tmp_path / ".made.partial").rglob("*.safetensors"))
    with pytest.raises(MXDiTError):
        mxdit.Session.open(tmp_path / ".made.partial").load()

    calibrate(model, tmp_path)
    assert contents(tmp_path / "made") == contents(whole / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]
    assert calibrated(tmp_path).keys() == calibrated(whole).keys()
