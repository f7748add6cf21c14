"""The safetensors reader on sound files, and on folders of them: shards, and the index that lists them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch as library
import torch
from torch import Tensor

from mxdit.checkpoint.files import BITS, CODES, DTYPES, MAX_JSON, read_header
from mxdit.checkpoint.folders import open_tensors
from mxdit.errors import CheckpointError
from safefiles import bits, entry, raw


def sample() -> dict[str, Tensor]:
    """A tensor of every dtype, with the odd sizes among them: no data, no axes, an odd number of bytes."""
    tensors = {"none": torch.empty(3, 0, dtype=torch.bfloat16), "scalar": torch.tensor(2.5)}
    for code, dtype in DTYPES.items():
        data = torch.randint(0, 2 if dtype is torch.bool else 256, (5 * dtype.itemsize,), dtype=torch.uint8)
        tensors[code] = data.view(dtype)
    return tensors


def test_what_the_library_writes_reads_back(tmp_path):
    file, tensors = tmp_path / "x.safetensors", sample()
    library.save_file(tensors, file, metadata={"format": "pt"})
    read = read_header(file)
    assert {name: bits(tensor.read()) for name, tensor in read.items()} == {n: bits(t) for n, t in tensors.items()}
    assert all(read[code].info.dtype is dtype and CODES[dtype] == code for code, dtype in DTYPES.items())
    assert read["none"].read().shape == (3, 0) and read["scalar"].read().shape == ()


@pytest.mark.parametrize("pad", range(9))
def test_data_may_lie_at_any_byte(tmp_path, pad):
    """The format aligns nothing: a header of another length moves all data, and an odd tensor the one after it."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(7).double(),
        "half": torch.randn(5).half(),
    }
    header, data = {}, b""
    for name, tensor in tensors.items():
        blob = tensor.numpy().tobytes()
        header[name] = entry(CODES[tensor.dtype], [len(tensor)], len(data), len(data) + len(blob))
        data += blob
    (tmp_path / "x.safetensors").write_bytes(raw(json.dumps(header).encode() + b" " * pad, data))
    read = read_header(tmp_path / "x.safetensors")
    assert {name: bits(read[name].read()) for name in read} == {n: bits(t) for n, t in tensors.items()}
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in (read[name].read() for name in read))


def test_data_beyond_the_first_page_is_mapped_not_copied(tmp_path):
    big = torch.arange(1 << 20, dtype=torch.int32)
    library.save_file({"a": torch.zeros(10_000), "big": big, "c": big[:3].clone()}, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors")
    assert torch.equal(tensors["big"].read(), big) and torch.equal(tensors["c"].read(), big[:3])
    view = tensors["big"].read()
    view += 1  # of the private mapping: the file stays
    assert torch.equal(tensors["big"].read(), big)


def test_every_dtype_of_the_library_is_known_by_its_size(tmp_path):
    for code, width in BITS.items():
        (tmp_path / "x.safetensors").write_bytes(raw({"a": entry(code, [8], 0, width)}, b"\1" * width))
        tensor = read_header(tmp_path / "x.safetensors")["a"]
        with library.safe_open(tmp_path / "x.safetensors", "pt") as theirs:
            assert theirs.get_slice("a").get_dtype() == tensor.code == code
        if code not in DTYPES:
            assert tensor.info.dtype is None
            with pytest.raises(CheckpointError, match=f"a: a dtype that no layer takes; got {code}"):
                tensor.read()


def test_a_file_that_is_cut_after_its_header_was_read(tmp_path):
    library.save_file({"a": torch.zeros(5000)}, tmp_path / "x.safetensors")
    tensor = read_header(tmp_path / "x.safetensors")["a"]
    os.truncate(tmp_path / "x.safetensors", 4096)
    with pytest.raises(CheckpointError, match="cut"):
        tensor.read()
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        tensor.read()


# -- several files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    library.save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "m-1.safetensors")
    library.save_file({"c": torch.ones(3)}, tmp_path / "m-2.safetensors")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: object, name: str = "m.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_read_as_one(sharded):
    library.save_file({"a": torch.ones(1)}, sharded / "another.safetensors")  # none of the index's
    assert {name: tensor.file.name for name, tensor in open_tensors(sharded).items()} == {
        "a": "m-1.safetensors",
        "b": "m-1.safetensors",
        "c": "m-2.safetensors",
    }
    (sharded / "another.safetensors").unlink()
    (sharded / "m.safetensors.index.json").unlink()
    assert list(open_tensors(sharded)) == ["a", "b", "c"]


TRICKS = [
    "../x.safetensors", "/etc/passwd", "a/b.safetensors", "./m-1.safetensors", "a\\b.safetensors", "m-1.safetensors\0",
    "m\0-1.safetensors", "m-1.safetensors/", "..", ".", "", "m-1.bin", "\ud800.safetensors", "a\nb.safetensors", 7, None,
    ["m-1.safetensors"], "/proc/self/mem.safetensors", "~/x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS, ids=repr)
def test_an_index_names_files_of_its_folder_only(sharded, trick):
    library.save_file({"c": torch.ones(3)}, sharded.parent / "x.safetensors")
    index(sharded, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": trick})
    with pytest.raises(CheckpointError, match="none of its folder's") as caught:
        open_tensors(sharded)
    assert "index.json: c" in str(caught.value) and str(caught.value).isprintable()


WHOLE = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
INDEXES = {
    "too few": ({"a": "m-1.safetensors", "c": "m-2.safetensors"}, "b in m-1.safetensors; expected in no file"),
    "too many": ({**WHOLE, "d": "m-2.safetensors"}, "d in no file; expected in m-2.safetensors"),
    "another shard": ({**WHOLE, "b": "m-2.safetensors"}, "b in m-1.safetensors; expected in m-2.safetensors"),
    "a shard that is not there": (
        {**WHOLE, "d": "m-3.safetensors"},
        "m-3.safetensors: a file that the index names is missing; got 1 of 3 files missing",
    ),
    "a shard with a long name": ({**WHOLE, "d": "m" * 300 + ".safetensors"}, "a file that the index names is missing"),
    "an empty map": ({}, "no weight_map"),
    "a list": ([], "no weight_map"),
    "a hostile name": ({**WHOLE, "d\x1b[2J": "m-1.safetensors"}, "name of a tensor"),
}


@pytest.mark.parametrize("weight_map, said", INDEXES.values(), ids=INDEXES.keys())
def test_an_index_agrees_with_its_files(sharded, weight_map, said):
    index(sharded, weight_map)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(sharded)
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_what_else_a_folder_can_hold(sharded, tmp_path_factory):
    index(sharded, WHOLE, "n.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"more than one index; got m\.safetensors.* n\.safetensors"):
        open_tensors(sharded)
    for text in (
        "",
        "{",
        "[]",
        "1",
        '{"weight_map": 1}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 10**5,
        "\0",
        "\ud800",
    ):
        (sharded / "n.safetensors.index.json").unlink(missing_ok=True)
        (sharded / "m.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"m\.safetensors\.index"):
            open_tensors(sharded)
    (sharded / "m.safetensors.index.json").write_bytes(b" " * (MAX_JSON + 1))
    with pytest.raises(CheckpointError, match=str(MAX_JSON + 1)):
        open_tensors(sharded)
    (sharded / "m.safetensors.index.json").unlink()
    library.save_file({"b": torch.ones(3)}, sharded / "m-3.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a tensor is in two files; got b in m-1\.safetensors and m-3\.safetensors"
    ):
        open_tensors(sharded)
    with pytest.raises(CheckpointError, match="no weights"):
        open_tensors(tmp_path_factory.mktemp("empty"))
