"""A damaged or hostile safetensors file is refused with one message: no crash, no hang, no memory."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_files import write_shard
from ladezeit.checkpoint.safetensors_header import DTYPE_BITS, read_header
from ladezeit.errors import CheckpointError

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(header: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_header(path)


def test_entries_point_at_the_tensors_bytes(tmp_path: Path) -> None:
    """A proof that compares with the file's bytes must find them where the header says."""
    path = tmp_path / "x.safetensors"
    write_shard(path, b=[1.0, 2.0], a=[[1], [2]], scalar=3.5)
    content, expected = path.read_bytes(), safetensors.numpy.load_file(path)
    header = read_header(path, shard=7)
    assert [tensor.begin for tensor in header.tensors] == sorted(tensor.begin for tensor in header.tensors)
    assert header.file_bytes == len(content) == header.tensors[-1].end
    for tensor in header.tensors:
        assert content[tensor.begin : tensor.end] == expected[tensor.name].tobytes()
        assert tensor.shape == expected[tensor.name].shape
        assert tensor.shard == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: it has 0 bytes"),
        (b"\x01\x02", "is truncated: it has 2 bytes"),
        (raw_file({"a": ONE}, length=2**63), "claims a header of 9223372036854775808 bytes"),
        (raw_file({"a": ONE}, length=500), "claims a header of 500 bytes, more than the file holds"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (raw_file(b"not json"), "not valid JSON"),
        (raw_file(b"\xff\xfe"), "not valid JSON"),
        (raw_file(b"[]"), "expected an object, found list"),
        (raw_file(b"[" * 200_000), "nested too deeply"),
        (raw_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN is not JSON"),
        (raw_file(b'{"a":1,"a":2}'), "the key 'a' occurs twice"),
        (raw_file({"a": ONE}, b"\0" * 7), "is truncated: its header describes"),
        (raw_file({"a": ONE}, b"\0" * 9), "1 bytes behind its last tensor"),
        (raw_file({"a": 1}), "described by int"),
        (raw_file({"a": {**ONE, "dtype": "F33"}}), "unknown dtype F33"),
        (raw_file({"a": {**ONE, "dtype": ["F32"]}}), "unknown dtype"),
        (raw_file({"a": {**ONE, "shape": [3]}}), "dtype, shape and offsets disagree"),
        (raw_file({"a": {**ONE, "shape": [-2]}}), "no valid shape"),
        (raw_file({"a": {**ONE, "shape": [True, 2]}}), "no valid shape"),
        (raw_file({"a": {**ONE, "shape": [2.0]}}), "no valid shape"),
        (raw_file({"a": {**ONE, "shape": [2**40, 2**40]}}), "dtype, shape and offsets disagree"),
        (raw_file({"a": ONE, "b": {**ONE, "shape": [2**63, 2**63, 0], "data_offsets": [8, 8]}}), "disagree"),
        (raw_file({"a": {**ONE, "data_offsets": [8, 0]}}), "no valid data_offsets"),
        (raw_file({"a": {**ONE, "data_offsets": [0, 8, 8]}}), "no valid data_offsets"),
        (raw_file({"a": {**ONE, "data_offsets": [0, 2**64]}}), "no valid data_offsets"),
        (raw_file({"a": ONE, "b": ONE}), "overlaps 'a'"),
        (raw_file({"a": {**ONE, "data_offsets": [8, 16]}}, b"\0" * 16), "leaves a gap of 8 bytes after the header"),
        (raw_file({"a": {**ONE, "dtype": "F4", "shape": [15]}}), "disagree"),
        (raw_file({"__metadata__": {"format": 1}, "a": ONE}), "not a mapping of text to text"),
        (raw_file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "not Unicode"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    """The user learns which file is damaged, and how."""
    with pytest.raises(CheckpointError) as error:
        read(tmp_path / "x.safetensors", content)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 900


def test_every_dtype_of_the_format_is_known(tmp_path: Path) -> None:
    """A checkpoint that safetensors opens is not refused for its dtype."""
    for dtype, bits in DTYPE_BITS.items():
        content = raw_file({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}, b"\0" * bits)
        assert read(tmp_path / "x.safetensors", content).tensors[0].dtype == dtype
        assert opens(tmp_path / "x.safetensors")


def test_empty_tensors_and_padding_are_fine(tmp_path: Path) -> None:
    """Zero-sized tensors and the spaces that align the data occur in real files."""
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]}
    content = raw_file(json.dumps({"a": ONE, "e": empty}).encode() + b"   ")
    assert [tensor.name for tensor in read(tmp_path / "x.safetensors", content).tensors] == ["a", "e"]


def test_a_lying_length_costs_no_memory(tmp_path: Path) -> None:
    """A file of 20 bytes cannot make the supervisor allocate what it claims."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{}" * 6)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_pipe_or_folder_is_refused_at_once(tmp_path: Path) -> None:
    """A named pipe in a checkpoint folder does not hang the program for ever."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe.safetensors", "folder.safetensors"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_header(tmp_path / name)


def opens(path: Path) -> bool:
    """Whether the safetensors library itself opens the file."""
    try:
        with safetensors.safe_open(path, "np") as file:
            file.keys()
    except (safetensors.SafetensorError, OSError, ValueError):
        return False
    return True


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "good.safetensors"
    write_shard(path, b=[1.0, 2.0], a=[[1], [2]], scalar=3.5, empty=0)
    return path


@settings(max_examples=500)
@given(data=st.data())
def test_random_damage_is_either_refused_or_read_as_safetensors_reads_it(good_file: Path, data: st.DataObject) -> None:
    """Whatever bits flip in a header or its length: `CheckpointError`, or a file that safetensors opens too."""
    content = bytearray(good_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 40) | st.just(0))
    path = good_file.with_name("damaged.safetensors")
    path.write_bytes(content[: len(content) - cut])
    assert_read_as_safetensors_does(path)


numbers = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 2**200, True, 1.5, None])
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F31", None, 3]),
        "shape": st.lists(numbers, max_size=3) | numbers,
        "data_offsets": st.tuples(st.integers(0, 24), st.integers(0, 24)).map(list) | st.lists(numbers, max_size=3),
    },
)
plausible = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4"]),
        "shape": st.lists(st.integers(0, 4), max_size=2),
        "data_offsets": st.sampled_from([[0, 4], [0, 8], [4, 8], [8, 16], [0, 16], [0, 0], [8, 8], [4, 4]]),
    }
)


@settings(max_examples=500)
@given(
    header=st.dictionaries(st.sampled_from("abc_é"), plausible | fields | numbers, max_size=3), size=st.integers(0, 24)
)
def test_random_headers_are_judged_as_safetensors_judges_them(good_file: Path, header: Any, size: int) -> None:
    """No header that safetensors would refuse passes, so no load fails later on what could be seen before."""
    path = good_file.with_name("invented.safetensors")
    path.write_bytes(raw_file(header, b"\0" * size))
    assert assert_read_as_safetensors_does(path) == opens(path)


def assert_read_as_safetensors_does(path: Path) -> bool:
    """Read within the memory that a file of this size may cost; return whether it was accepted."""
    tracemalloc.start()
    try:
        tensors = read_header(path).tensors
    except CheckpointError as error:
        assert len(str(error)) < 900
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000
    assert opens(path)
    assert all(tensor.end <= path.stat().st_size for tensor in tensors)
    return True
