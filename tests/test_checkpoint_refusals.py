"""Quantizing a checkpoint that is not as it should be: refused before the first byte, and what is there is left alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as library
import torch

import tiny
from mxdit.checkpoint import quantize_checkpoint
from mxdit.errors import CheckpointError, ConfigError, InputError, MXDiTError
from safefiles import contents

pytestmark = pytest.mark.slow

SHARD = 100_000  # some three shards an expert


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = library.load_file(folder / tiny.WEIGHTS)
    change(tensors)
    library.save_file(tensors, folder / tiny.WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], type[MXDiTError], str]] = {
    "a missing tensor": (
        lambda m: edit_tensors(m / "transformer_2", lambda t: t.pop("blocks.1.ffn.net.2.weight")), {},
        CheckpointError, "blocks.1.ffn.net.2.weight: missing tensor",
    ),
    "an extra tensor": (
        lambda m: edit_tensors(m / "transformer", lambda t: t.update(more=torch.ones(1))), {},
        CheckpointError, "more: a tensor that the model has no place for",
    ),
    "a misshapen tensor": (
        lambda m: edit_tensors(m / "transformer_2", lambda t: t.update({"proj_out.bias": torch.ones(1)})), {},
        CheckpointError, "proj_out.bias: misshapen tensor; got (1,) float32; expected (64,)",
    ),
    "a mistyped tensor": (
        lambda m: edit_tensors(m / "transformer", lambda t: t.update({"proj_out.bias": torch.ones(64).long()})), {},
        CheckpointError, "proj_out.bias: mistyped tensor; got (64,) int64",
    ),
    "a truncated file": (
        lambda m: os.truncate(m / "transformer" / tiny.WEIGHTS, 90_000), {}, CheckpointError, "truncated",
    ),
    "no config": (lambda m: (m / "transformer" / "config.json").unlink(), {}, CheckpointError, "config.json"),
    "a config of a model unknown": (
        lambda m: (m / "transformer" / "config.json").write_text('{"_class_name": ["Flux"]}'), {},
        CheckpointError, "does not know this kind of model",
    ),
    "a config of far too many layers": (
        lambda m: (m / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_layers": 1000000000}'),
        {}, CheckpointError, "num_layers",
    ),
    "a link to nothing": (
        lambda m: (m / "vae" / "gone").symlink_to("nothing"), {}, CheckpointError, "vae/gone: not a file",
    ),
    "an expert that is not there": (lambda m: shutil.rmtree(m / "transformer_2"), {}, CheckpointError, "transformer_2"),
    "an index that is none": (lambda m: (m / "model_index.json").write_text("[]"), {}, CheckpointError, "model_index.json"),
    "a pattern that matches nothing": (
        None, {"config": {"quant_method": "mxfp4", "ignored_layers": ["blocks.9.*"]}}, ConfigError, "matches nothing",
    ),
    "a method unknown": (None, {"config": "mxfp5"}, ConfigError, "unknown quant_method"),
    "an expert unknown": (None, {"overrides": {"transformer_3": None}}, ConfigError, "transformer_3"),
    "every expert left out": (
        None, {"overrides": {"transformer": None, "transformer_2": None}}, ConfigError, "every component is left unquantized",
    ),
    "a config of a serialized checkpoint": (
        None, {"config": {"quant_method": "mxfp4", "is_checkpoint_serialized": True}}, ConfigError, "serialized",
    ),
    "shards too small": (None, {"shard_size": 1000}, InputError, "a shard cannot hold one module"),
    "a dtype of no model": (None, {"dtype": torch.int8}, InputError, "torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("damage, options, kind, said", BAD.values(), ids=BAD.keys())
def test_refused_before_the_first_byte(source, tmp_path, damage, options, kind, said):
    model = shutil.copytree(source, tmp_path / "model")
    if damage:
        damage(model)
    with pytest.raises(kind) as caught:
        quantize_checkpoint(model, tmp_path / "out", **{"config": "mxfp4", **options})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["a file", "a directory", "a link to nothing", "the source"])
def test_a_destination_that_exists_is_left_alone(source, tmp_path, there):
    destination = tmp_path / "out"
    make: dict[str, Callable[[], Any]] = {
        "a file": lambda: destination.write_text("mine"),
        "a directory": destination.mkdir,
        "a link to nothing": lambda: destination.symlink_to("nothing"),
        "the source": lambda: shutil.copytree(source, destination),
    }
    make[there]()
    before = destination.lstat(), contents(tmp_path)
    with pytest.raises(InputError, match="the destination exists"):
        quantize_checkpoint(source if there != "the source" else destination, destination, "mxfp4")
    assert (destination.lstat().st_mtime_ns, contents(tmp_path)) == (before[0].st_mtime_ns, before[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_destination_that_appears_while_it_is_written_is_left_alone(source, tmp_path):
    plan = quantize_checkpoint(source, tmp_path / "out", "mxfp4", shard_size=SHARD)
    with pytest.raises(InputError, match="the destination exists"):
        plan.write(lambda done, total: (tmp_path / "out").mkdir(exist_ok=True))
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out").rmdir()
    steps: list[int] = []
    plan.write(lambda done, total: steps.append(done))
    assert len(steps) == sum(len(component.shards) for component in plan.components)  # what was made is not made again
    assert (tmp_path / "out" / "model_index.json").is_file()
