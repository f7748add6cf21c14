"""One run of each tool for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import original
import peers
import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized pipeline, FP32 as the published ones are."""
    directory = tmp_path_factory.mktemp("wan") / "base"
    pipe = tiny.pipeline("t2v", torch.float32)
    pipe.register_modules(**{component: original.transformer(component) for component in original.EXPERTS.values()})
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What msModelSlim makes of the same experts: a directory for each of `peers.RECIPES`."""
    peers.require_peers()
    root = tmp_path_factory.mktemp("slim")
    peers.msmodelslim(original.save(root / "original"), root / "made")
    return root / "made"
