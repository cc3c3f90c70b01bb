"""The header of a safetensors file, read with every bound checked before anything of its size is allocated.

A file is: 8 bytes little-endian length of the header, the header (a JSON object: tensor name to dtype, shape and
offsets), then the data, which the tensors must cover without gap or overlap.
"""

import hashlib
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.dtypes import DTYPE_BITS
from ladezeit.checkpoint.files import parse_object, shorten_value
from ladezeit.errors import CheckpointError

#: The format's own limit of a header, in bytes.
MOST_HEADER_BYTES = 100_000_000
#: Elements no tensor can have more of; the format counts in 64 bits.
_MOST_ELEMENTS = 2**64
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: the bytes `begin` to `end` of its file, counted from the start of the file.

    `dtype` is safetensors' name (``BF16``); `shard` the position of the file in `Checkpoint.shards`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself: tensors in the order of their bytes, and the hash of the header's own bytes."""

    tensors: tuple[TensorEntry, ...]
    sha256: str
    file_bytes: int


def read_header(path: Path, shard: int = 0) -> Header:
    """Read and check the header of the safetensors file `path`, which becomes number `shard` of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or its header and its length do not agree in every point.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb", buffering=0) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            # Read-ahead would warm pages of what a cold load measures.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            length = _header_length(_exactly(file, min(8, file_bytes), path), file_bytes, path)
            raw = _exactly(file, length, path)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause
    return Header(parse_header(raw, file_bytes, str(path), shard), hashlib.sha256(raw).hexdigest(), file_bytes)


def parse_header(raw: bytes, file_bytes: int, label: str, shard: int = 0) -> tuple[TensorEntry, ...]:
    """Return the tensors of the header `raw` of a file of `file_bytes`, in the order of their bytes.

    Raises:
        CheckpointError: opened by `label`, says the first thing that is wrong.
    """
    entries = parse_object(raw, f"{label}: its header")
    _check_metadata(entries.pop(_METADATA, None), label)
    start = 8 + len(raw)
    tensors = [_entry(name, fields, shard, start, label) for name, fields in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_cover(tensors, start, file_bytes, label)
    return tuple(tensors)


def _exactly(file: FileIO, count: int, path: Path) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = file.read(count - len(parts))
        if not part:
            raise CheckpointError(f"{path} became shorter while it was read: is it still being written?")
        parts += part
    return bytes(parts)


def _header_length(raw: bytes, file_bytes: int, path: Path) -> int:
    if len(raw) < 8:
        raise CheckpointError(
            f"{path} is truncated: it has {file_bytes} bytes, and a safetensors file at least 10. Fetch it again"
        )
    if raw == b"version ":
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it with: git lfs pull")
    length = int.from_bytes(raw, "little")
    if length > min(file_bytes - 8, MOST_HEADER_BYTES):
        limit = "the format's limit" if length <= file_bytes - 8 else "more than the file holds"
        raise CheckpointError(
            f"{path} claims a header of {length} bytes, {limit}, in a file of {file_bytes}: it is truncated or no "
            f"safetensors file. Fetch it again"
        )
    return length


def _check_metadata(metadata: object, label: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{label}: {_METADATA} in its header is not a mapping of text to text")


def _entry(name: str, fields: object, shard: int, start: int, label: str) -> TensorEntry:
    shown = f"{label}: tensor '{shorten_value(name)}'"
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointError(f"{shown} has a name that is not Unicode text")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{shown} is described by {type(fields).__name__}, not by an object")
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{shown} has the unknown dtype {shorten_value(dtype)}; known are {', '.join(DTYPE_BITS)}"
        )
    if not _counts(shape):
        raise CheckpointError(f"{shown} has no valid shape: {shorten_value(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{shown} has no valid data_offsets: {shorten_value(offsets)}")
    begin, end = offsets
    if _bits(shape, dtype) != (end - begin) * 8:
        raise CheckpointError(
            f"{shown} of {dtype} {shorten_value(shape)} does not fit its {end - begin} bytes: dtype, shape and offsets "
            f"disagree"
        )
    return TensorEntry(name, dtype, tuple(shape), shard, start + begin, start + end)


def _counts(value: Any) -> bool:
    """Whether `value` is a list of whole numbers as the format counts; bool is an int in Python, not here."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in value)


def _bits(shape: list[int], dtype: str) -> int:
    """Return the bits of a tensor, or -1 where they overflow; stops there, so a hostile shape costs no time."""
    elements = 1
    for n in shape:
        elements *= n
        if elements >= _MOST_ELEMENTS:
            return -1
    return elements * DTYPE_BITS[dtype]


def _check_cover(tensors: list[TensorEntry], start: int, file_bytes: int, label: str) -> None:
    position, last = start, "the header"
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlaps" if tensor.begin < position else f"leaves a gap of {tensor.begin - position} bytes after"
            raise CheckpointError(f"{label}: tensor '{shorten_value(tensor.name)}' {what} {last}; the file is damaged")
        position, last = tensor.end, f"'{shorten_value(tensor.name)}'"
    if file_bytes < position:
        raise CheckpointError(
            f"{label} is truncated: its header describes {position} bytes, the file has {file_bytes}. Fetch it again"
        )
    if file_bytes > position:
        raise CheckpointError(
            f"{label} has {file_bytes - position} bytes behind its last tensor that belong to nothing. Fetch it again"
        )
