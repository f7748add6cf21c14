"""Shared settings: the same random numbers in every run, and hypothesis without clocks or a database."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, and there is no GPU here; see `interpreted`
FAKES = str(Path(__file__).parent / "fakes")
sys.path.insert(0, FAKES)  # mxdit registers its Ascend kernels if it can find torch_npu when it is imported
try:
    from mxdit import MXConfig
    from mxdit.backends import native
    from mxdit.conformance.calls import one_thread
    from mxdit.numerics.formats import FORMATS
finally:
    sys.path.remove(FAKES)

settings.register_profile("mxdit", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("mxdit")


def pytest_collection_finish() -> None:
    """What imports have made stays, and the collector need not look at it again: 4 % to 9 % of the time of tests that build
    models."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries that count their objects at the end would find all of them."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same seed, whichever tests ran before it."""
    torch.manual_seed(20260101)


@pytest.fixture(scope="module", params=[*native.paths(), native.REFERENCE])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation that can answer on this CPU, one after the other."""
    with native.using(request.param):
        yield request.param


@pytest.fixture
def single_threaded() -> Iterator[None]:
    """Beside other tests, waiting for a second thread takes longer than its work."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T2V cascade in BF16, one file per expert. Tests edit copies of it."""
    import tiny  # and with it diffusers, which most tests do without

    return tiny.save(tmp_path_factory.mktemp("source") / "wan")


@pytest.fixture(scope="module", params=FORMATS)
def method(request: pytest.FixtureRequest) -> str:
    """Each format of weights, one after the other."""
    return request.param


@pytest.fixture(scope="module")
def stored(source: Path, method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The high-noise expert of `source`, quantized online and saved."""
    import tiny

    directory = tmp_path_factory.mktemp("stored") / method
    tiny.load(source / "transformer", MXConfig(method)).save_pretrained(directory)
    return directory


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fake torch_npu and an emulated Ascend 950 (tests/fakes). Both are gone after the test but for the device's name,
    which torch keeps; other tests see a machine without an NPU."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no devices written in Python")
    monkeypatch.syspath_prepend(FAKES)
    import torch_npu

    with torch_npu.state.pretending(count=1):
        yield torch_npu
    del sys.modules["torch_npu"]
    for library, question in (("accelerate", "is_npu_available"), ("transformers", "is_torch_npu_available")):
        for name in (f"{library}.utils.imports", f"{library}.utils.import_utils"):
            ask = getattr(sys.modules.get(name), question, None)
            if hasattr(ask, "cache_clear"):
                ask.cache_clear()  # they remember the answer
