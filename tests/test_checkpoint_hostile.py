"""The safetensors reader on damaged and hostile files: one error each, and what it takes the library takes as well."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch as library
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import processes
from mxdit.checkpoint.files import BITS, DTYPES, MAX_JSON, read_header, read_json
from mxdit.checkpoint.folders import open_tensors
from mxdit.errors import CheckpointError
from safefiles import bits, entry, raw

pytestmark = pytest.mark.slow

FUZZ = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No file makes the reader hang: a test that takes long ends with an error."""

    def ring(number: int, frame: object) -> None:
        raise RuntimeError("the reader hangs")  # not an OSError, which the reader would take for the file's

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(processes.TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(path: Path) -> CheckpointError:
    """The error that reading the file, tensors included, ends with: one printable line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in read_header(path).values():
            tensor.read()
    message = str(caught.value)
    assert str(path) in message and len(message) < len(str(path)) + 1000
    assert message.replace(str(path), "").isprintable(), message
    return caught.value


ONE = entry("U8", [4], 0, 4)
HOSTILE = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "a length of 2^64 - 1": (raw(b"{}", length=(1 << 64) - 1), "truncated"),
    "a length one too long": (raw(b"{}", length=3), "truncated"),
    "a length beyond the limit": (raw(b"{}", b"\0" * MAX_JSON, length=MAX_JSON + 1), "truncated"),
    "a length one too short": (raw({"a": ONE}, b"abcd", length=len(json.dumps({"a": ONE})) - 1), "JSON"),
    "a pickle": (b"\x80\x04\x95" + b"\x8c\x05torch" * 20, "truncated"),
    "no JSON": (raw(b"{'a': 1}"), "JSON"),
    "no object": (raw([ONE]), "JSON object"),
    "no UTF-8": (raw(b'{"\xff\xfe": 1}'), "utf-8"),
    "half a character": (raw(b'{"\\ud800": 1}'), "name of a tensor"),
    "a control character": (raw({"a\x1b[2Jb": ONE}, b"abcd"), "name of a tensor"),
    "an endless name": (raw({"a" * 100_000: ONE}, b"abcd"), "name of a tensor"),
    "a name twice": (raw(b'{"a": %b, "a": %b}' % (b"1", b"2")), "'a' occurs twice"),
    "a name twice, one escaped": (raw(b'{"a": 1, "\\u0061": 2}'), "'a' occurs twice"),
    "a key twice": (raw(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', b"a"), "twice"),
    "metadata that is no text": (raw({"__metadata__": {"a": 1}, "a": ONE}, b"abcd"), "__metadata__"),
    "metadata that is a list": (raw({"__metadata__": [], "a": ONE}, b"abcd"), "__metadata__"),
    "metadata of half a character": (raw(b'{"__metadata__": {"a": "\\ud800"}}'), "__metadata__"),
    "nested lists": (raw(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
    "nested objects": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "JSON"),
    "an entry that is no object": (raw({"a": 1}), "entry"),
    "an entry without a shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"a"), "entry"),
    "an entry with more keys": (raw({"a": {**ONE, "x": 1}}, b"abcd"), "entry"),
    "an unknown dtype": (raw({"a": entry("U7", [4], 0, 4)}, b"abcd"), "U7"),
    "a dtype that is a list": (raw({"a": {**ONE, "dtype": ["U8"]}}, b"abcd"), "dtype"),
    "another dtype": (raw({"a": entry("F32", [4], 0, 4)}, b"abcd"), "expected 16 for [4] F32"),
    "another shape": (raw({"a": entry("U8", [5], 0, 4)}, b"abcd"), "expected 5"),
    "half a byte": (raw({"a": entry("F4", [3], 0, 1)}, b"a"), "expected 1.5"),
    "a negative axis": (raw({"a": entry("U8", [-4], 0, 4)}, b"abcd"), "-4"),
    "two negative axes": (raw({"a": entry("U8", [-2, -2], 0, 4)}, b"abcd"), "-2"),
    "an axis that is a float": (raw({"a": entry("U8", [4.0], 0, 4)}, b"abcd"), "4.0"),  # type: ignore[list-item]
    "an axis that is a truth": (raw({"a": entry("U8", [True], 0, 1)}, b"a"), "True"),
    "an axis of minus nothing": (raw(b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}'), "-0"),
    "an axis that is NaN": (raw(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}'), "NaN"),
    "an axis of 2^60": (raw({"a": entry("F32", [1 << 60], 0, 4)}, b"abcd"), "[1152921504606846976]"),
    "an axis of 2^60 and its offsets": (raw({"a": entry("U8", [1 << 60], 0, 1 << 60)}, b"abcd"), "[1152921504606846976]"),
    "an axis of 5000 digits": (raw(b'{"a": {"dtype": "U8", "shape": [%b], "data_offsets": [0, 1]}}' % (b"9" * 5000)), "JSON"),
    "axes beyond 64 bits": (raw({"a": entry("U8", [1 << 32] * 64, 0, 4)}, b"abcd"), "shape"),
    "axes beyond 64 bits of no data": (raw({"a": entry("U8", [0, 1 << 62, 1 << 62], 0, 0)}), "shape"),
    "thousands of axes": (raw({"a": entry("U8", [1] * 5000, 0, 1)}, b"a"), "impossible shape"),
    "offsets back to front": (raw({"a": entry("U8", [4], 4, 0)}, b"abcd"), "offsets"),
    "negative offsets": (raw({"a": entry("U8", [4], -4, 0)}, b"abcd"), "-4"),
    "three offsets": (raw({"a": {**ONE, "data_offsets": [0, 4, 8]}}, b"abcd"), "offsets"),
    "offsets that are text": (raw({"a": {**ONE, "data_offsets": "04"}}, b"abcd"), "offsets"),
    "overlap": (raw({"a": ONE, "b": entry("U8", [4], 2, 6)}, b"abcdef"), "overlap"),
    "the same data twice": (raw({"a": ONE, "b": ONE}, b"abcd"), "overlap"),
    "nothing inside another": (raw({"a": ONE, "b": entry("U8", [0], 2, 2)}, b"abcd"), "overlap"),
    "a gap": (raw({"a": ONE, "b": entry("U8", [1], 5, 6)}, b"abcdef"), "gap"),
    "a gap before the first": (raw({"a": entry("U8", [4], 1, 5)}, b"abcde"), "gap"),
    "bytes after the last": (raw({"a": ONE}, b"abcde"), "belong to no tensor"),
    "one byte less": (raw({"a": ONE}, b"abc"), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("data, said", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_file_is_one_error(tmp_path, data, said):
    (tmp_path / "x.safetensors").write_bytes(data)
    assert said in str(refusal(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("depth", range(940, 1000, 7))
def test_nesting_at_the_edge_of_what_python_recurses_into(tmp_path, depth):
    (tmp_path / "x.safetensors").write_bytes(raw(b'{"a": ' + b"[" * depth + b"]" * depth + b"}"))
    refusal(tmp_path / "x.safetensors")


def test_no_file_makes_it_allocate_more_than_the_file_holds(tmp_path):
    def read_all() -> None:
        processes.limit_memory(32 << 20)
        for number in range(len(HOSTILE)):
            try:
                read_header(tmp_path / str(number))
            except CheckpointError:
                continue
            raise AssertionError(number)

    for number, (data, _) in enumerate(HOSTILE.values()):
        (tmp_path / str(number)).write_bytes(data)
    assert processes.run(tmp_path / "out", read_all) == (0, "")


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "gone.safetensors").symlink_to("nothing")
    (tmp_path / "null.safetensors").symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        refusal(path)
        assert os.path.lexists(path)
        folder = tmp_path / path.stem
        folder.mkdir()
        path.rename(folder / path.name)
        with pytest.raises(CheckpointError, match=path.name):  # never passed over: what it should hold would be missing
            open_tensors(folder)
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.json", tmp_path / "folder", tmp_path / "none.json"):
        with pytest.raises(CheckpointError, match=path.name):
            read_json(path)


# -- at random -------------------------------------------------------------------------------------------------------


def check_as_the_library(path: Path) -> None:
    """Our verdict on a file is an error or the library's own tensors."""
    try:
        ours = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error) and str(error).replace(str(path), "").isprintable()
        return
    with library.safe_open(path, "pt") as theirs:
        assert ours.keys() == set(theirs.keys())
        for name, tensor in ours.items():
            slice = theirs.get_slice(name)
            assert (slice.get_dtype(), tuple(slice.get_shape())) == (tensor.code, tensor.shape)
            if tensor.code in DTYPES:
                assert bits(tensor.read()) == bits(theirs.get_tensor(name))


def mutated(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, length, new in edits:
        at %= len(data) + 1
        if kind == "flip":
            data = data[:at] + bytes(b ^ (1 << length % 8) for b in data[at : at + 1]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + length :]
        elif kind == "splice":  # a stretch of the file over another of its places
            data = data[:at] + data[length : length + len(new)] + data[at + len(new) :]
        else:
            data = data[:at]
    return data


EDITS = st.tuples(
    st.sampled_from(["flip", "flip", "insert", "delete", "splice", "cut"]),
    st.one_of(st.integers(-17, -1), st.integers(0, 500)),
    st.integers(0, 40),
    st.binary(min_size=1, max_size=12),
)


@FUZZ
@given(edits=st.lists(EDITS, min_size=1, max_size=4), mend=st.booleans())
def test_damaged_files(tmp_path, edits, mend):
    valid = {
        "a.weight": torch.arange(6).view(2, 3).half(),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.ones(()),
    }
    data = mutated(library.save(valid), edits)
    if mend and len(data) > 8:  # or most damage would only show in the header's length
        header = data[8:].rpartition(b"}")
        data = raw(header[0] + header[1], header[2])
    (tmp_path / "x.safetensors").write_bytes(data)
    check_as_the_library(tmp_path / "x.safetensors")


NUMBERS = st.one_of(
    st.integers(0, 9), st.sampled_from([-1, 1 << 31, 1 << 32, (1 << 62) - 1, 1 << 60, 1 << 63, 1 << 64, 0.0, None, "1", True])
)  # fmt: skip
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F7", "", None]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.tuples(st.integers(0, 9), st.integers(0, 9))),
    }
)


@pytest.mark.slow
@FUZZ
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), data=st.binary(max_size=40))
def test_headers_of_any_numbers(tmp_path, header, data):
    (tmp_path / "x.safetensors").write_bytes(raw(header, data))
    check_as_the_library(tmp_path / "x.safetensors")


@FUZZ
@given(
    shapes=st.lists(st.tuples(st.sampled_from(list(BITS)), st.lists(st.integers(0, 4), max_size=3)), max_size=4),
    off=st.sampled_from([0, 0, 0, 1, -1]),
    order=st.randoms(use_true_random=False),
)
def test_headers_that_fit_or_nearly(tmp_path, shapes, off, order):
    header, end = {}, 0
    for number, (code, shape) in enumerate(shapes):
        nbits = BITS[code] * int(torch.Size(shape).numel())
        header[f"t{number}"] = entry(code, shape, end, end + nbits // 8)
        end += nbits // 8
    items = list(header.items())
    order.shuffle(items)
    (tmp_path / "x.safetensors").write_bytes(raw(dict(items), bytes(end + off if end + off > 0 else 0)))
    check_as_the_library(tmp_path / "x.safetensors")
