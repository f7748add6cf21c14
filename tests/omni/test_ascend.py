"""On Ascend: whose linears answer, and every operator that ours call, through the fake torch_npu (`on_ascend.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine

SINGLE = ["npu_dynamic_mx_quant", "npu_quant_matmul"]
DUAL = ["npu_dynamic_dual_level_mx_quant", "npu_dual_level_quant_matmul"]
ENGINES = {  # it keeps what it supports
    "numeric mxfp4": "NPUMxfp4LinearMethod",
    "numeric mxfp4_dualscale": "NPUMxfp4DualScaleLinearMethod",
    "numeric mxfp8": "NPUMxfp8LinearMethod",
    "numeric mxfp4, two ranks": "NPUMxfp4LinearMethod",
    "online mxfp4": "NPUMxfp4OnlineLinearMethod",
    "online mxfp4_dualscale": "NPUMxfp4DualScaleOnlineLinearMethod",
    "ignored by a glob": "UnquantizedLinearMethod",
    "online mxfp8": "NPUMxfp8OnlineLinearMethod",
    "steps over mxfp4": "NPUMxfp4OnlineLinearMethod",
}
OURS = {  # what it cannot, or was told to leave: the operators of one call
    "numeric mxfp4, ours": SINGLE,
    "numeric mxfp4_dualscale, ours": DUAL,
    "numeric mxfp8, ours": SINGLE,
    "packed mxfp4": SINGLE,
    "packed mxfp4_dualscale": DUAL,
    "packed mxfp8": SINGLE,
    "packed mxfp4, two ranks": SINGLE,
    "packed mxfp4_dualscale, two ranks": DUAL,
    "packed mxfp8, two ranks": SINGLE,
    "numeric dual, two ranks": DUAL,
    "online dual, two ranks": DUAL,
    # No operator multiplies these: the weight comes back from its blocks, and the reference answers.
    "steps over dual": ["npu_format_cast", "npu_dynamic_mx_quant"],
    "bf16 activations": [],
}


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, here / "on_ascend.py"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=engine.TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_is_looked_at(said):
    assert said.keys() == ENGINES.keys() | OURS.keys()


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_own_linears_stay(said, name):
    assert set(said[name]["methods"]) == {ENGINES[name]}


@pytest.mark.parametrize("name", OURS)
def test_ours_answer_on_every_rank(said, name):
    ranks = 2 if name.endswith("two ranks") else 1
    assert said[name] == {"methods": ["MXLinearMethod"] * ranks, "calls": [OURS[name]] * ranks, "equal": [True] * ranks}
