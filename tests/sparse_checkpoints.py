"""A checkpoint larger than any memory that takes no disk: a header, and a hole of 4 TB where its weights would be."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

_BYTES = 2**42


def four_terabytes(tiny: Any, folder: Path) -> Path:
    """Write it beside the configs of `tiny`; skips the test where the file system has no files of that length."""
    folder.mkdir()
    for path in tiny.folder.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    entry = {"dtype": "BF16", "shape": [_BYTES // 2], "data_offsets": [0, _BYTES]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    raw = header + b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.flush()
        try:
            os.ftruncate(file.fileno(), 8 + len(raw) + _BYTES)
        except OSError as cause:
            pytest.skip(f"no file of that length here: {cause}")
    return folder
