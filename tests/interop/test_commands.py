"""The commands on other tools' directories: what they print, and how they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

import peers
from mxdit import cli

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mxdit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, stdout and stderr of `mxdit ARGS`, run in this process."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mxdit", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", ["dual-smoothed", "single", "mxfp8", "w4a8"])
def test_convert_and_inspect_all_the_way(mxdit, base, quantized, tmp_path, name):
    code, out, _ = mxdit("inspect", quantized / name, "--base", base)
    assert code == 0 and "modelslim layout" in out and "clean" in out
    code, out, _ = mxdit("convert", quantized / name, tmp_path / "packed", "--base", base)
    assert code == 0 and "written" in out
    code, out, _ = mxdit("convert", tmp_path / "packed", tmp_path / "exported", "--to", "vllm-omni", "--json")
    assert code == 0 and json.loads(out)["written"]
    code, out, _ = mxdit("inspect", tmp_path / "exported", "--json")
    found = json.loads(out)
    assert code == 0 and found["clean"] and found["pipeline"]
    assert {expert["loaders"]["vLLM-Omni 0.30"] for expert in found["experts"]} == {None}
    code, _, err = mxdit("convert", tmp_path / "exported", tmp_path / "packed")
    assert code == 2 and "the destination exists" in err


def test_a_directory_of_a_merge_tool(mxdit, base, quantized, tmp_path):
    older = peers.numeric(quantized / "dual-smoothed", tmp_path / "numeric")
    merged = peers.merged("merge_mxfp4_dualscale_checkpoint", base, older, tmp_path / "merged")
    code, out, _ = mxdit("inspect", merged)
    assert code == 0 and out.count("vllm-omni layout, linears: ") == 2
    assert mxdit("convert", merged, tmp_path / "packed")[0] == 0
    assert mxdit("inspect", tmp_path / "packed")[0] == 0


@pytest.mark.parametrize(
    ("chosen", "linears"),
    [((), "6 float, 10 mxfp8, 10 mxfp4"), (("--fallback-from-base",), "16 float, 10 mxfp4")],
    ids=["mixed", "from the base"],
)
def test_the_public_recipe_needs_a_decision(mxdit, base, quantized, tmp_path, chosen, linears):
    source, out = quantized / "public", tmp_path / "packed"
    code, printed, _ = mxdit("inspect", source, "--base", base)
    assert code == 0 and printed.count("linears: 6 float, 10 mxfp8, 10 mxfp4") == 2
    code, _, err = mxdit("convert", source, out, "--base", base, *chosen)
    assert code == 2 and "--allow-loss" in err and not out.exists()
    decided = (source, out, "--base", base, *chosen, "--allow-loss")
    code, printed, err = mxdit("convert", *decided, "--dry-run")
    assert code == 0 and "would be written" in printed and not out.exists()
    code, printed, err = mxdit("convert", *decided)
    assert code == 0 and err.count("lost: ") == 4 and printed.count(f"linears: {linears}") == 2
    assert mxdit("inspect", out)[0] == 0


@pytest.mark.parametrize("arguments", [["inspect"], ["convert", "--to", "packed"]])
def test_without_the_base_there_is_no_config(mxdit, quantized, tmp_path, arguments):
    command, *rest = arguments
    places = [quantized / "single"] if command == "inspect" else [quantized / "single", tmp_path / "packed"]
    code, _, err = mxdit(command, *places, *rest)
    assert code == 2 and "--base" in err and err.count("\n") <= 3 and "Traceback" not in err
