"""The registry of backends: mxdit's own, and those that other packages bring by an entry point."""

from __future__ import annotations

import importlib
import re
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

import mxdit
from mxdit import backends, ops
from mxdit.backends import Backend

MODULE = """
import torch
from mxdit.backends import Backend, Layout
PACKED = []
def pack(w):
    PACKED.append(w.shape)
    return w.view(torch.int8)
BACKEND = Backend("a stranger's", "xpu", lambda: None, layouts={"mxfp4": Layout("nz", pack, lambda w: w.view(torch.uint8))})
META = Backend("another", "meta", lambda: None)
NONE = object()
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that a package with these entry points of the group is installed."""
    (tmp_path / "a_strangers_backend.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def install(**points: str) -> None:
        found = EntryPoints(EntryPoint(name, value, backends.GROUP) for name, value in points.items())
        monkeypatch.setattr(backends, "entry_points", lambda **wanted: found.select(**wanted))
        backends._entry_points.cache_clear()
        backends._loaded.cache_clear()

    yield install
    backends._entry_points.cache_clear()
    backends._loaded.cache_clear()
    sys.modules.pop("a_strangers_backend", None)


def test_a_backend_of_another_package_is_imported_when_it_is_asked_for(installed):
    installed(xpu="a_strangers_backend:BACKEND")
    assert backends.layout_for(torch.device("cpu"), "mxfp4") is None
    assert "a_strangers_backend" not in sys.modules
    layout = backends.layout_for(torch.device("xpu"), "mxfp4")
    assert layout is not None and backends.backend_for(torch.device("xpu")).name == "a stranger's"
    assert layout.pack(torch.zeros(2, 4, dtype=torch.uint8)).dtype is torch.int8
    assert importlib.import_module("a_strangers_backend").PACKED == [(2, 4)]
    assert [b.name for b in backends.backends()][-2:] == ["a stranger's", "reference (torch)"]


@pytest.mark.parametrize("value", ("a_strangers_backend:NONE", "a_strangers_backend:NOTHING", "no_such_module_here:X"))
def test_an_entry_point_that_leads_nowhere_says_so(installed, value):
    installed(xpu=value)
    said = rf"mxdit.backends: xpu = {value}.*expected a mxdit.backends"
    with pytest.raises(mxdit.BackendError, match=said):
        backends.backend_for(torch.device("xpu"))
    (listed,) = [backend for backend in backends.backends() if backend.device == "xpu"]
    assert listed.name == value and re.search(said, listed.why_not() or "")


def test_a_backend_for_another_device_than_its_name_is_refused(installed):
    installed(mps="a_strangers_backend:BACKEND")
    with pytest.raises(mxdit.BackendError, match="whose device is 'mps'"):
        backends.backend_for(torch.device("mps"))


def test_a_weight_brings_the_backend_of_its_device(installed, monkeypatch):
    installed(meta="a_strangers_backend:META")
    assert "a_strangers_backend" not in sys.modules
    mxdit.quantize_weight(torch.empty(4, 64, device="meta"), "mxfp4")
    assert "a_strangers_backend" in sys.modules


def test_where_no_backend_answers_the_reference_does():
    assert backends.backend_for(torch.device("meta")) is backends.REFERENCE
    assert backends.layout_for(torch.device("meta"), "mxfp4_dualscale") is None


def test_a_module_implements_the_ops_that_it_has_functions_for():
    library, registered = ops.LIBRARY, []

    class Kernels:
        @staticmethod
        def quantize(x, fmt, rule, round_mode):
            return x, x

    class Recording:
        @staticmethod
        def impl(name, kernel, key):
            registered.append((name, kernel, key))

    ops.LIBRARY = Recording
    try:
        ops.implement("XPU", Kernels)
    finally:
        ops.LIBRARY = library
    assert registered == [("quantize", Kernels.quantize, "XPU")]
    assert isinstance(Backend("x", "xpu", lambda: None).about(), str)
