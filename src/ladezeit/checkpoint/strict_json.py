"""JSON from files of unknown origin: bounded, no duplicate keys, and never an error but `CheckpointError`."""

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from ladezeit.errors import CheckpointError

#: A config.json of a large vision model has some 50 kB, an index of 18,867 tensors 2 MB.
MOST_BYTES = 100_000_000


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `raw`; `what` opens the message of the error.

    Raises:
        CheckpointError: no UTF-8, no JSON, no object, or a key stands there twice.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{what} is not valid: it is nested too deeply to be read") from None
    except ValueError as cause:
        raise CheckpointError(f"{what} is not valid JSON: {shortened(cause)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not valid: expected an object, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`; raises `CheckpointError` as `parse_object` does, or if unreadable."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if found.st_size > MOST_BYTES:
            raise CheckpointError(f"{path} has {found.st_size} bytes: at most {MOST_BYTES} are read as JSON")
        return parse_object(path.read_bytes(), str(path))
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause


def shortened(value: object, most: int = 120) -> str:
    """Return `value` as printable text of bounded length, for error messages about content that may be hostile."""
    text = str(value)
    text = text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
    return text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{shortened(twice)}' stands there twice")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
