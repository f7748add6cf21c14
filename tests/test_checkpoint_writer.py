"""Writing checkpoints: files that others read, the same bytes always, planned before the first byte, nothing overwritten."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest
import safetensors.torch as library
import torch

import tiny
from command import mxdit_command
from mxdit.checkpoint import quantize_checkpoint
from mxdit.checkpoint.files import CODES, DTYPES, read_header
from mxdit.checkpoint.folders import open_tensors
from mxdit.checkpoint.writer import Part, Shard, new_directory, shards_of
from mxdit.errors import CheckpointError, InputError
from mxdit.numerics.formats import TensorInfo
from safefiles import bits, contents

pytestmark = pytest.mark.slow

SHARD = 100_000  # some three shards an expert


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part(TensorInfo.of(tensor), lambda t=tensor: t) for name, tensor in tensors.items()}


# -- one file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_that_the_library_reads(tmp_path, reverse):
    tensors = {"none": torch.empty(0, 3), "scalar": torch.tensor(1.5), "turned": torch.arange(6.0).view(2, 3).T}
    for code, dtype in DTYPES.items():
        tensors[f"of {code}"] = torch.ones(5 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    items = reversed(tensors.items()) if reverse else tensors.items()
    with new_directory(tmp_path / "out", "plan") as staging:
        staging.write_shard("x.safetensors", Shard("x.safetensors", parts_of(dict(items))))
    read = library.load_file(tmp_path / "out" / "x.safetensors")
    assert {name: bits(tensor) for name, tensor in read.items()} == {n: bits(t) for n, t in tensors.items()}
    with library.safe_open(tmp_path / "out" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for tensor in read_header(tmp_path / "out" / "x.safetensors").values():
        assert tensor.start % DTYPES[tensor.code].itemsize == 0  # so that every reader can map it


def test_the_order_in_which_tensors_are_made_does_not_show(tmp_path):
    tensors = {
        f"t{i}": torch.full((3 + i,), i, dtype=dtype) for i, dtype in enumerate(CODES) if dtype is not torch.bool
    }
    written = []
    for number, names in enumerate((tensors, reversed(tensors), sorted(tensors, key=lambda name: name[::-1]))):
        with new_directory(tmp_path / str(number), "plan") as staging:
            staging.write_shard("x", Shard("x", parts_of({name: tensors[name] for name in names})))
        written.append((tmp_path / str(number) / "x").read_bytes())
    assert len(set(written)) == 1


def test_a_tensor_that_is_not_as_planned_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a: a tensor differs from its plan; got \(2,\) float32"):  # noqa: SIM117
        with new_directory(tmp_path / "out", "plan") as staging:
            part = Part(TensorInfo((2,), torch.bfloat16), lambda: torch.ones(2))
            staging.write_shard("x", Shard("x", {"a": part}))
    assert not list(tmp_path.iterdir())


def test_shards_hold_modules_whole():
    sizes = {"b.w": 60, "a.w": 30, "b.bias": 10, "c.w": 30, "top": 1, "a.bias": 1}
    parts = parts_of({name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()})
    shards = shards_of(parts, 70, "m")
    assert [(shard.name, list(shard.parts)) for shard in shards] == [
        ("m-00001-of-00002.safetensors", ["b.w", "b.bias"]),
        ("m-00002-of-00002.safetensors", ["a.w", "a.bias", "c.w", "top"]),
    ]
    assert [shard.name for shard in shards_of(parts, 132, "m")] == ["m.safetensors"]
    with pytest.raises(InputError, match="69 bytes, and b has 70"):
        shards_of(parts, 69, "m")


# -- a directory -------------------------------------------------------------------------------------------------------


def test_shards_are_what_hosts_read_and_the_same_tensors_in_any_number(source, tmp_path):
    plans = {
        size: quantize_checkpoint(source, tmp_path / str(size), "mxfp4", shard_size=size) for size in (SHARD, 1 << 30)
    }
    for plan in plans.values():
        plan.write()
    many, one = (tmp_path / str(size) / "transformer" for size in plans)
    index = json.loads((many / f"{tiny.WEIGHTS}.index.json").read_text())
    files = sorted(many.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files] and len(files) > 2
    assert [file.name for file in one.glob("*.safetensors*")] == [tiny.WEIGHTS]
    tensors = {name: (file.name, t) for file in files for name, t in library.load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in tensors.values())
    assert all(sum(t.nbytes for f, t in tensors.values() if f == file.name) <= SHARD for file in files)
    whole = library.load_file(one / tiny.WEIGHTS)
    assert {name: bits(tensor) for name, (_, tensor) in tensors.items()} == {n: bits(t) for n, t in whole.items()}
    assert tiny.same(tiny.load(many, dtype=None), tiny.load(one, dtype=None))


def test_the_same_bytes_again_and_from_other_shards(source, tmp_path):
    shutil.copytree(source, tmp_path / "resharded")
    for name in ("transformer", "transformer_2"):
        model = tiny.load(source / name, dtype=None)
        shutil.rmtree(tmp_path / "resharded" / name)
        model.save_pretrained(tmp_path / "resharded" / name, max_shard_size="100KB")
        shutil.copy(source / name / "config.json", tmp_path / "resharded" / name)
    assert len(list((tmp_path / "resharded" / "transformer").glob("*.safetensors"))) > 2
    written = {}
    for number, directory in enumerate((source, source, tmp_path / "resharded")):
        quantize_checkpoint(directory, tmp_path / str(number), "mxfp4_dualscale", shard_size=SHARD).write()
        written[number] = contents(tmp_path / str(number))
    assert written[0] == written[1] == written[2]


def test_what_is_planned_is_what_is_written(source, tmp_path):
    plan = quantize_checkpoint(source, tmp_path / "out", "mxfp4_dualscale", {"transformer_2": None}, shard_size=SHARD)
    said = json.loads(json.dumps(plan.to_dict()))
    seen: list[tuple[int, int]] = []
    plan.write(lambda done, total: seen.append((done, total)))
    files = {f"{e['component']}/{name}": tensors for e in said["experts"] for name, tensors in e["files"].items()}
    written = {name: {n: str(t.info) for n, t in read_header(tmp_path / "out" / name).items()} for name in files}
    assert written == files and len(files) > 5
    assert {p.parent.name for p in (tmp_path / "out").rglob("*.safetensors")} >= {"transformer", "transformer_2"}
    assert set(contents(tmp_path / "out")) == {
        *files, *said["carried"], "model_index.json", *(f"{e}/config.json" for e in ("transformer", "transformer_2")),
        *(f"{e}/{tiny.WEIGHTS}.index.json" for e in ("transformer", "transformer_2")),
    }  # fmt: skip
    assert seen[-1] == (said["bytes"], said["bytes"]) and seen == sorted(seen)
    assert said["bytes"] == sum(t.nbytes for name in files for t in read_header(tmp_path / "out" / name).values())


def test_a_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path, monkeypatch, capsys):
    args = ["quantize", source, tmp_path / "out", "--method", "mxfp4", "--dry-run"]
    code, out, _ = mxdit_command(monkeypatch, capsys, *args, "--json")
    expected = quantize_checkpoint(source, tmp_path / "out", "mxfp4").to_dict()
    assert code == 0 and json.loads(out) == {**expected, "written": False}
    _, text, _ = mxdit_command(monkeypatch, capsys, *args)
    assert "blocks.0.attn1.to_q.weight_scale" in text and "(64, 2) uint8" in text and "would be written" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_what_is_kept_has_the_dtype_asked_for(tmp_path, stored, dtype):
    tiny.transformer().to(stored).save_pretrained(tmp_path / "source")
    config = {"quant_method": "mxfp4_dualscale", "ignored_layers": ["blocks.0.*"]}
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", config, dtype=dtype).write()
    kept = {n: t.info.dtype for n, t in open_tensors(tmp_path / "out").items() if "scale" not in n.rpartition(".")[2]}
    eight = {name for name, of in kept.items() if of is torch.uint8}
    assert len(eight) == tiny.LINEARS and set(kept.values()) == {torch.uint8, dtype}
    assert open_tensors(tmp_path / "out")["scale_shift_table"].info.dtype is dtype  # a table of the model's, no scale


# -- what is carried over ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_the_rest_is_linked_or_copied(source, tmp_path, copy):
    model = shutil.copytree(source, tmp_path / "model")
    (model / "README.md").write_text("a model")
    (model / ".cache").mkdir()
    (model / ".cache" / "junk").write_text("junk")
    (model / "vae").rename(tmp_path / "elsewhere")
    (model / "vae").symlink_to(tmp_path / "elsewhere")  # as a hub's cache has files, and users have folders
    (model / "text_encoder" / "config.json").rename(tmp_path / "blob")
    (model / "text_encoder" / "config.json").symlink_to(tmp_path / "blob")
    (model / "scheduler" / "loop").symlink_to(model)
    plan = quantize_checkpoint(model, tmp_path / "out", "mxfp4")
    plan.write(copy=copy)
    assert {name.partition("/")[0] for name in plan.carried} == {
        "README.md",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    for name, path in plan.carried.items():
        made = tmp_path / "out" / name
        assert made.read_bytes() == path.read_bytes() and not made.is_symlink()
        assert os.path.samefile(made, path) is not copy
    assert json.loads((tmp_path / "out" / "model_index.json").read_text()) == json.loads(
        (source / "model_index.json").read_text()
    )
    assert not any("cache" in name or "loop" in name for name in contents(tmp_path / "out"))


def test_files_that_cannot_be_linked_are_copied(source, tmp_path, monkeypatch):
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    plan = quantize_checkpoint(source, tmp_path / "out", "mxfp4")
    plan.write()
    assert all((tmp_path / "out" / name).read_bytes() == path.read_bytes() for name, path in plan.carried.items())


def test_a_folder_that_cannot_be_read_is_not_passed_over(source, tmp_path, monkeypatch):
    real = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("vae"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CheckpointError, match="vae: the folder cannot be read; got Permission denied"):
        quantize_checkpoint(source, tmp_path / "out", "mxfp4")
