"""What the engine is told to do and cannot: one clear error, before weights are read where that can be known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import engine
import quantized
import tiny
from quantized import EXPERTS

DUAL = {"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0}
LAYER = "blocks.1.attn1.to_k"


@pytest.fixture(scope="module")
def packed(directories, tmp_path_factory) -> Path:
    return quantized.write(
        directories["t2v"], tmp_path_factory.mktemp("packed") / "model", dict.fromkeys(EXPERTS, DUAL)
    )


def changed(source: Path, directory: Path, *, drop: tuple[str, ...] = (), config: dict[str, Any] | None = None) -> Path:
    """A copy whose second expert lacks tensors, or has another `quantization_config`."""
    shutil.copytree(source, directory)
    folder = directory / EXPERTS[1]
    tensors = {name: part for name, part in load_file(folder / tiny.WEIGHTS).items() if name not in drop}
    save_file(tensors, folder / tiny.WEIGHTS, {"format": "pt"})
    if config is not None:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return directory


def refused(model: Path, folder: Path, **options: Any) -> str:
    """What the engine prints when it does not start."""
    folder.mkdir()
    with pytest.raises(engine.EngineFailed) as error:
        engine.run(model, folder, options)
    return str(error.value)


def test_a_missing_scale_is_named_before_weights_are_read(packed, tmp_path):
    model = changed(packed, tmp_path / "model", drop=(f"{LAYER}.weight_dual_scale",))
    said = refused(model, tmp_path / "run")
    assert f"{LAYER}.weight_dual_scale: missing" in said
    assert READING not in said


def test_half_of_q_k_and_v(directories, tmp_path):
    config = {"quant_method": "mxfp4", "ignored_layers": [LAYER]}
    said = refused(directories["t2v"], tmp_path / "run", quantization_config=config)
    assert "layers that share their input would differ in precision" in said and LAYER in said
    assert READING not in said


def test_a_checkpoint_of_two_methods(packed, tmp_path):
    config = {
        "quant_method": "mxfp4",
        "is_checkpoint_serialized": True,
        "ignored_layers": [],
        "layout": "packed",
        "version": 1,
    }
    said = refused(changed(packed, tmp_path / "model", config=config), tmp_path / "run")
    assert "mxfp4_dualscale" in said and "CheckpointError" in said
    assert READING not in said


def test_another_method_than_the_checkpoint_has(packed, tmp_path):
    said = refused(packed, tmp_path / "run", quantization_config="mxfp8")
    assert "declares quant_method='mxfp4_dualscale'" in said
    assert READING not in said


def test_an_unknown_key(directories, tmp_path):
    said = refused(
        directories["t2v"], tmp_path / "run", quantization_config={"method": "mxfp4", "ignored_layer": ["x"]}
    )
    assert "unknown key; got 'ignored_layer'" in said and "ignored_layers" in said
    assert READING not in said


def test_a_degree_that_does_not_give_whole_blocks(directories, tmp_path):
    model = tmp_path / "model"
    pipe = tiny.pipeline("t2v")
    for seed, expert in enumerate(EXPERTS):
        narrow = tiny.transformer(seed=seed, attention_head_dim=16, num_attention_heads=2).bfloat16()
        setattr(pipe, expert, narrow)
    pipe.save_pretrained(model)
    said = refused(model, tmp_path / "run", quantization_config="mxfp4", tensor_parallel_size=2)
    assert "K = 32 cannot be split over so many ranks" in said and "attn1.to_out" in said
    assert READING not in said


READING = "Loading safetensors checkpoint shards"  # what the engine prints when it begins to read weights
