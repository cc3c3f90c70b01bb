"""Faults in a checkpoint's file: each edits one file in place and leaves its times, as a failing disk does."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.validation.faults import Fault

UP = "model.layers.1.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
EXTRA = "model.layers.1.mlp.extra_proj.weight"
_WORD = 2  # bytes of a bfloat16
_NAN = b"\xc0\x7f"


class OpenFile:
    """A file of weights as header, data, and where the bytes of a weight are; `places` is (offset, length) by name."""

    def __init__(self, content: bytearray, places: dict[str, tuple[int, int]]) -> None:
        self.content = content
        self.places = places

    def header(self) -> dict[str, Any]:
        """Return the header of a safetensors file, in the order in which it is written."""
        length = int.from_bytes(self.content[:8], "little")
        return dict(json.loads(self.content[8 : 8 + length]))

    def replace_header(self, header: dict[str, Any], added: bytes = b"") -> None:
        """Write another header before the same data, and `added` after it."""
        data = self.content[8 + int.from_bytes(self.content[:8], "little") :]
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self.content[:] = len(raw).to_bytes(8, "little") + raw + data + added


def flipped_bit(file: OpenFile) -> None:
    at, length = file.places[UP]
    file.content[at + length // 2] ^= 16


def swapped_words(file: OpenFile) -> None:
    at, _ = file.places[UP]
    one, other = slice(at, at + _WORD), slice(at + 1800, at + 1800 + _WORD)
    file.content[one], file.content[other] = file.content[other], file.content[one]


def swapped_tensors(file: OpenFile) -> None:
    one, other = (slice(at, at + length) for at, length in (file.places[UP], file.places[GATE]))
    file.content[one], file.content[other] = file.content[other], file.content[one]


def planted_nan(file: OpenFile) -> None:
    at, _ = file.places[UP]
    file.content[at + 20 : at + 20 + _WORD] = _NAN


def missing(file: OpenFile) -> None:
    """The last weight of the file goes, with its bytes, so that what is left is a valid file."""
    header = file.header()
    name = last_of(header)
    begin, end = header.pop(name)["data_offsets"]
    del file.content[len(file.content) - (end - begin) :]
    file.replace_header(header)


def extra(file: OpenFile) -> None:
    header = file.header()
    _, end = header[last_of(header)]["data_offsets"]
    file.replace_header({**header, EXTRA: {"dtype": "BF16", "shape": [4], "data_offsets": [end, end + 8]}}, bytes(8))


def wrong_shape(file: OpenFile) -> None:
    header = file.header()
    header[UP]["shape"].reverse()
    file.replace_header(header)


def wrong_dtype(file: OpenFile) -> None:
    header = file.header()
    header[UP]["dtype"] = "F16"
    file.replace_header(header)


def truncated(file: OpenFile) -> None:
    del file.content[-100:]


def trailing_bytes(file: OpenFile) -> None:
    file.content += b"left behind"


def overlapping_offsets(file: OpenFile) -> None:
    header = file.header()
    begin, end = header[UP]["data_offsets"]
    header[UP]["data_offsets"] = [begin - 16, end - 16]
    file.replace_header(header)


def header_length_lie(file: OpenFile) -> None:
    file.content[:8] = (len(file.content) + 1).to_bytes(8, "little")


#: Every fault of files, and whether it is one of a file's content alone, so that any format can have it.
IN_FILES: dict[Fault, tuple[Callable[[OpenFile], None], bool]] = {
    Fault.flipped_bit_in_file: (flipped_bit, True),
    Fault.swapped_words_in_file: (swapped_words, True),
    Fault.swapped_tensors_in_file: (swapped_tensors, True),
    Fault.nan_in_file: (planted_nan, True),
    Fault.missing_in_file: (missing, False),
    Fault.extra_in_file: (extra, False),
    Fault.wrong_shape_in_file: (wrong_shape, False),
    Fault.wrong_dtype_in_file: (wrong_dtype, False),
    Fault.truncated_file: (truncated, True),
    Fault.trailing_bytes: (trailing_bytes, True),
    Fault.overlapping_offsets: (overlapping_offsets, False),
    Fault.header_length_lie: (header_length_lie, False),
}


def plant(fault: Fault, path: Path, places: dict[str, tuple[int, int]]) -> None:
    """Plant `fault` in the file `path`, whose weights lie at `places`; its times stay."""
    before = path.stat()
    file = OpenFile(bytearray(path.read_bytes()), places)
    IN_FILES[fault][0](file)
    path.write_bytes(file.content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def places_in(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return where the weights lie in the one shard of `checkpoint`."""
    return {entry.name: (entry.begin, entry.end - entry.begin) for entry in checkpoint.tensors}


def places_in_conversion(checkpoint: Checkpoint, converted: Path) -> dict[str, tuple[int, int]]:
    """Return where the two weights that are damaged lie in a file of another format, which holds the same bytes."""
    shard, content = checkpoint.shards[0].read_bytes(), converted.read_bytes()
    own = places_in(checkpoint)
    found = {name: content.find(shard[own[name][0] : sum(own[name])]) for name in (UP, GATE)}
    assert min(found.values()) > 0, f"{converted} does not hold the weights as they are"
    return {name: (at, own[name][1]) for name, at in found.items()}


def last_of(header: dict[str, Any]) -> str:
    """Return the name of the weight whose bytes are the last."""
    entries = {name: fields for name, fields in header.items() if name != "__metadata__"}
    return max(entries, key=lambda name: int(entries[name]["data_offsets"][1]))


def names_of(fault: Fault, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of which a finding of `fault` must say at least one: a weight's, or the file's or its folder's.

    `checkpoint` is as it was before the fault.
    """
    if fault is Fault.missing_in_file:
        return (max(checkpoint.tensors, key=lambda entry: entry.end).name,)
    if fault is Fault.extra_in_file:
        return (EXTRA,)
    if fault in (Fault.truncated_file, Fault.trailing_bytes, Fault.header_length_lie):
        return (checkpoint.shards[0].name,)
    return (UP, GATE)
