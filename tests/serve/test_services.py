"""The unit for systemd and the Dockerfile of examples/: the options that they use are there, and mean what they should."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from command import mxdit_command
from mxdit.serve.dispatch import GRACE
from serving import KEY

ROOT = Path(__file__).parents[2]
UNIT = (ROOT / "examples" / "mxdit.service").read_text()
IMAGE = (ROOT / "examples" / "Dockerfile").read_text().replace("\\\n", " ")
NAMES = ("${STATE_DIRECTORY}", "${CREDENTIALS_DIRECTORY}/keys", "/data", "/run/secrets/mxdit-keys")


def of_unit(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


def of_image(word: str) -> list[str]:
    return re.findall(rf"^{word} +(.*)$", IMAGE, re.MULTILINE)


def commands() -> dict[str, list[str]]:
    (start,), (entry,), (more,) = of_unit("ExecStart"), of_image("ENTRYPOINT"), of_image("CMD")
    return {"mxdit.service": shlex.split(start), "Dockerfile": [*json.loads(entry), *json.loads(more)]}


@pytest.mark.parametrize("file", ["mxdit.service", "Dockerfile"])
def test_its_command_is_right_but_for_a_port_that_is_taken(monkeypatch, capsys, tmp_path, file):
    """The last that is looked at before a server runs: models, devices, keys and directories were found well."""
    program, *args = commands()[file]
    assert program == "/opt/mxdit/bin/mxdit" and args[0] == "serve"
    (tmp_path / "keys").write_text(KEY + "\n")
    here = dict(zip(NAMES, [tmp_path / "data", tmp_path / "keys"] * 2, strict=True))
    assert sum(arg in here for arg in args) == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [port if arg == "8091" else str(here.get(arg, arg)) for arg in args]
        code, _, err = mxdit_command(monkeypatch, capsys, *given)
    assert code == 2 and "it cannot be listened there" in err and "in use" in err, err
    assert (tmp_path / "data" / "lock").exists()


def test_the_time_to_end_is_more_than_a_server_takes():
    (wait,), (run,) = (
        of_unit("TimeoutStopSec"),
        re.findall(r"--stop-timeout (\d+)", (ROOT / "docs/serving.md").read_text()),
    )
    assert int(wait) == int(run) >= GRACE + 20


def test_the_dockerfile_copies_what_is_there_and_runs_as_nobody_else():
    for sources in of_image("COPY"):
        *names, _ = sources.split()
        for name in names:
            assert name.startswith(("--from", "/opt/mxdit")) or (ROOT / name).exists(), name
    assert of_image("USER") == ["mxdit"] and of_image("VOLUME") == ["/data"] and of_image("EXPOSE") == ["8091"]
    assert f"torch=={re.findall('^torch==(.*)$', (ROOT / 'constraints.txt').read_text(), re.MULTILINE)[0]}" in IMAGE
    (health,) = of_image("HEALTHCHECK")
    _, _, code = json.loads(health[health.index("[") :])
    compile(code, "HEALTHCHECK", "exec")
    assert ":8091/health" in code


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_finds_nothing_wrong_and_the_unit_exposes_little(tmp_path):
    unit = tmp_path / "mxdit.service"
    unit.write_text(UNIT.replace("/opt/mxdit/bin/mxdit", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    rated = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]  # of 100: 2.0 in its table
    done = subprocess.run(rated, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
