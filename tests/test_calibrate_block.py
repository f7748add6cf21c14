"""The benchmark of a block's calibration runs at a small width, and its formulas count what torch counts."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mxdit.calibrate import scales
from mxdit.calibrate.gptq import gptq
from mxdit.calibrate.linears import Recipe, _Group
from mxdit.numerics.formats import FORMATS

pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("calibrate_block")


def test_it_measures_every_phase_of_every_group(benchmark, monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.json"
    options = ["--dim", "128", "--ffn", "576", "--groups", "attn1.qkv", "attn2.kv", "ffn.net.2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["calibrate_block.py", *options])
    monkeypatch.setattr(benchmark, "alone", lambda function, *args: function(*args))
    threads = torch.get_num_threads()
    try:
        assert benchmark.main() == 0
    finally:
        torch.set_num_threads(threads)
    said, told = capsys.readouterr().out, json.loads(out.read_text())
    assert "arithmetic and not measured" in said and "as attn1.qkv" in said  # what was left out, by another's measure
    assert [row["group"] for row in told["rows"]] == ["attn1.qkv", "attn2.kv", "ffn.net.2"]
    for row, members, rows in zip(told["rows"], (3, 2, 1), (4096, 4096, 4608), strict=True):
        phases = row["phases"]
        assert row["rows"] == row["rows_full"] == rows
        passes = phases["smooth"]["calls"] and phases["hessian"]["calls"]
        assert {name: phases[name]["calls"] for name in ("exact", "search", "factor", "gptq", "refit")} == {
            "exact": 1, "search": passes, "factor": passes, "gptq": passes, "refit": passes,
        }  # fmt: skip
        assert phases["acceptance"]["calls"] >= 4 * members
        for what in ("wall", "cpu"):  # no second is counted twice
            assert 0 < sum(phase[what] for phase in phases.values()) <= row[what]
        assert all(phase["wall"] > 0 for name, phase in phases.items() if phase["calls"])
        assert len(row["steps"]) == members


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("k", (576, 1024))
def test_flop_by_formula_are_those_that_torch_counts(benchmark, method, k):
    shape, rows = benchmark.Shape("two", 2, 40, k), 5000
    wanted = benchmark.flop(shape, rows, method)
    linears = {str(i): nn.Linear(k, shape.n).bfloat16() for i in range(shape.count)}
    fit, held = (torch.randn(count, k).bfloat16() for count in (rows, benchmark.HELD_ROWS))

    def counted(function, *args):
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        return result, counter.get_total_flops()

    group, exact = counted(_Group, linears, fit, held, Recipe(method, "mxfp8" if method == "mxfp8" else "mxfp4"))
    quantized = group._quantized_input(fit, None)
    hessian, of_hessian = counted(
        torch.mm, quantized.mT, quantized
    )  # torch does not count what adds in place, as it is done
    weight = torch.cat(group.weights).float()
    packed, of_gptq = counted(gptq, weight, hessian, torch.eye(k), method)
    assert (exact, of_hessian, of_gptq) == (wanted["exact"], wanted["hessian"], wanted["gptq"])
    if packed.outer is not None:
        # The linear system of each row comes on top.
        assert counted(scales.refit, packed, weight, hessian)[1] == pytest.approx(wanted["refit"], rel=0.01)
