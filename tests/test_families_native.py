"""Pipelines called as diffusers has them, with videos, masks and whatever else no request of ours has words for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mxdit
from mxdit.checkpoint import inspect_checkpoint, quantize_checkpoint
from mxdit.models import ModelSpec
from tiny_families import NATIVE, tiny_of
from tiny_families.parts import Native

pytestmark = pytest.mark.slow

METHOD = "mxfp4"  # what a method does to a layer has tests of its own


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """FlexAttention, and what makes its masks, run as they are written: compiling them takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def opened(of: Any, directory: Path, config: Any = None, **parts: Any) -> Any:
    """The pipeline in a directory, of another's class; a modular one of its blocks, too, which no directory holds. `parts` are
    components that no directory holds."""
    options = {"torch_dtype": torch.bfloat16, "local_files_only": True}
    if not isinstance(of, diffusers.ModularPipeline):
        return type(of).from_pretrained(directory, **options, **parts, quantization_config=config)
    pipeline = type(of)(of.blocks, directory)
    pipeline.load_components(**options, **({"quantization_config": config.quant_mapping} if config else {}))
    return pipeline


def pictures(pipeline: Any, native: Native) -> NDArray[np.float64]:
    """What one call gives, as one array."""
    options, seed = native.call(), torch.Generator().manual_seed(0)
    if isinstance(pipeline, diffusers.ModularPipeline):
        return np.asarray(pipeline(**options, generator=seed, output=native.output), dtype=np.float64)
    return np.asarray(getattr(pipeline(**options, generator=seed), native.output), dtype=np.float64)


def methods(spec: ModelSpec, pipeline: Any) -> dict[str, set[str]]:
    """Transformer -> the methods of its quantized linears."""
    present = {name: model for name in spec.components if (model := getattr(pipeline, name, None)) is not None}
    return {
        name: {module.method for module in model.modules() if isinstance(module, mxdit.MXLinear)}
        for name, model in present.items()
    }


@pytest.mark.parametrize("spec, name", NATIVE)
def test_a_pipeline_of_diffusers_runs_quantized_online_and_offline_alike(spec, name, tmp_path):
    """Distances are in units of the pictures' own contrast: a flat grey one is 1 away, an unrelated one about 1.4."""
    native, parts = tiny_of(spec).native[name], tiny_of(spec).parts
    made, plain, packed = native.pipeline(), tmp_path / "plain", tmp_path / "packed"
    assert name == type(made).__name__ and name in {*spec.hosts, *spec.pipelines}, f"name {name} in `hosts`"
    made.save_pretrained(str(plain))  # of a modular pipeline, it takes no Path
    quantize_checkpoint(plain, packed, METHOD).write()
    assert inspect_checkpoint(packed).clean
    exact = opened(made, plain, **parts)
    expected = pictures(exact, native)
    assert np.isfinite(expected).all() and expected.std() > 0 and not any(methods(spec, exact).values())
    online = opened(made, plain, mxdit.pipeline_config(METHOD), **parts)
    assert (found := methods(spec, online)) and all(used == {METHOD} for used in found.values())
    quantized = pictures(online, native)
    distance = np.linalg.norm(quantized - expected) / np.linalg.norm(expected - expected.mean())
    assert np.isfinite(quantized).all() and 0 < distance < 0.5, "quantization changes the pictures, a little"
    shutil.rmtree(plain)  # to which the packed one must not refer
    offline = opened(made, packed, **parts)
    assert methods(spec, offline) == found and np.array_equal(pictures(offline, native), quantized)
