"""tools/device_check.py: its parts, real ones on the CPU, and what becomes of parts that crash, hang and fail."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from mxdit.backends import cpu
from mxdit.conformance import cases
from mxdit.ops.attention import METHODS
from test_docs import parsed

pytestmark = pytest.mark.slow


@pytest.fixture
def tool(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "tools"))
    return importlib.import_module("device_check")


def test_each_case_of_conformance_is_in_one_part(tool):
    items = tool.items_of_conformance()
    assert len(items) > 5 and {sum(item in case.name for item in items) for case in cases()} == {1}


def test_the_parts_that_need_no_diffusers_pass_on_a_cpu(tool, tmp_path, capsys):
    parts = [part for part in tool.parts_of("cpu", True) if not part.name.startswith(("block", "generate"))]
    assert tool.check(parts, 600, tmp_path / "check.json", "cpu"), capsys.readouterr().out
    report = json.loads((tmp_path / "check.json").read_text())
    found = {part["part"]: part["result"] for part in report["parts"]}
    conformance, *attention = (name for name in found if ":" in name)
    assert list(found) == ["environment", conformance, *attention, "norms, GELU", "gemm"]
    assert found["environment"]["versions"]["torch"]
    assert found[conformance]["totals"]["pass"] > 1
    rows = [row for name in attention for row in found[name]["rows"]]
    assert {row["method"] for row in rows} == {"torch", *METHODS}
    assert {row["right"] for row in rows if row["method"] != "torch"} == {True}
    assert {row["right"] for row in found["norms, GELU"]["rows"]} == {True}
    assert any(row["right"] and row["method"] == "mxfp4" for row in found["gemm"]["rows"])
    said = capsys.readouterr().out
    assert "exact x" in said and cpu.BACKEND.about() in said


@pytest.mark.parametrize(("device", "quick"), [("cuda", False), ("cpu", True)])
def test_every_command_has_these_options(tool, device, quick):
    commands = 0
    for part in tool.parts_of(device, quick):
        if part.arguments[:2] == ("-m", "mxdit.cli"):
            parsed([str(text) for text in part.arguments[2:]])
            commands += 1
        else:
            assert Path(part.arguments[0]).is_file()
    assert commands >= 5


def test_a_crash_and_a_hang_cost_their_own_part_only(tool, tmp_path, capsys):
    output = tmp_path / "check.json"
    shares = {
        "crashes": ("print('{\"so far\": 1}', flush=True); import os; os.abort()", 29),
        "hangs": ("import sys, time; print('waiting', file=sys.stderr, flush=True); time.sleep(999)", 2),
        "fails": ("raise SystemExit('wrong results')", 15),
        "reads": (f"print(open({str(output)!r}).read())", 15),
    }
    parts = [tool.Part(name, ("-c", program), share) for name, (program, share) in shares.items()]
    assert not tool.check(parts, 61, output, "cpu")
    crashed, hung, failed, read = json.loads(output.read_text())["parts"]
    assert (crashed["status"], crashed["exit_code"], crashed["result"]) == ("crashed", -6, {"so far": 1})
    assert hung["status"] == "timed out" and hung["seconds"] < 15
    assert hung["stderr"].startswith("waiting\n") and "line 1 in <module>" in hung["stderr"]  # where it was
    assert "line 1 in <module>" in crashed["stderr"]
    assert failed["status"] == "failed" and "wrong results" in failed["stderr"]
    assert read["status"] == "passed"
    assert [part["status"] for part in read["result"]["parts"]] == ["crashed", "timed out", "failed"]  # written at once
    said = capsys.readouterr().out
    assert "wrong results" in said and said.count('File "<string>", line 1 in <module>') == 2


def test_without_the_kernels_nothing_is_right(tool, tmp_path, capsys):
    """The reference passes everything where they do not answer: the environment says that they do not."""
    backends = [{"name": "cuda (triton)", "device": "cuda", "why_not": "no triton", "about": None}]
    part = tool.Part("environment", ("-c", f"import json; print(json.dumps({{'backends': {backends}}}))"), 1)
    assert not tool.check([part], 60, tmp_path / "check.json", "cuda:0")
    assert "cuda (triton) does not answer: no triton" in capsys.readouterr().out
    assert tool.check([part], 60, tmp_path / "check.json", "cpu")


def test_what_is_wrong_is_counted(tool, tmp_path, capsys):
    rows = [{"method": "gelu", "ratio": 2.0, "right": right} for right in (True, False)]
    program = f"import json, sys; print(json.dumps({{'rows': {rows}}})); sys.exit(1)"
    assert not tool.check([tool.Part("norms", ("-c", program), 1)], 60, tmp_path / "check.json", "cpu")
    assert "gelu x 2.00 to 2.00, 1 of 2 wrong" in capsys.readouterr().out


def test_what_there_was_no_time_for_is_said(tool, tmp_path):
    assert not tool.check([tool.Part("late", ("-c", "pass"), 1)], 0.5, tmp_path / "check.json", "cpu")
    (late,) = json.loads((tmp_path / "check.json").read_text())["parts"]
    assert late["status"] == "not run"


def test_a_machine_without_a_device_is_refused(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tool.torch.accelerator, "current_accelerator", lambda check_available: None)
    assert tool.main(["--output", str(tmp_path / "check.json")]) == 2
    assert "--device" in capsys.readouterr().err
