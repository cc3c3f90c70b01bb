"""Which bytes a checkpoint's files hold, as far as shows without reading them all; the hub's sha256, checked once.

The hub's cache names the blob of a large file by its sha256: that is its identity, and a promise that can be checked.
Any other file is known by size, modification time, inode and a digest of samples.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.fingerprint import sampled_digest
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.errors import CheckpointError
from ladezeit.system.files import write_atomically

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERIFIED = "verified"


def checkpoint_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return plain data that is equal as long as the checkpoint's files are what they were; reads samples only."""
    return {
        "fingerprint": checkpoint.fingerprint,
        "shards": [_file_identity(shard) for shard in checkpoint.shards],
    }


def promised_sha256(shard: Path) -> str | None:
    """Return the sha256 that the hub's cache names the file by, None for any other file."""
    blob = shard.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def verify(checkpoint: Checkpoint, cache: Path) -> int:
    """Check each shard that has a promised sha256 against its bytes; return how many shards have one.

    A shard that was found right is not read again while its size, times, inode and samples stay.

    Raises:
        CheckpointError: the bytes are not those that the hub has.
    """
    promised = [shard for shard in checkpoint.shards if promised_sha256(shard) is not None]
    unknown = [shard for shard in promised if not _note(shard, cache).exists()]
    with ThreadPoolExecutor(4) as pool:
        for shard, found in zip(unknown, pool.map(_sha256_of, unknown), strict=True):
            if found != promised_sha256(shard):
                raise CheckpointError(
                    f"{shard} is damaged: the hub has the sha256 {promised_sha256(shard)}, its bytes have {found}. "
                    f"Remove {shard.resolve()} and fetch the checkpoint again"
                )
            _remember(shard, cache)
    return len(promised)


def _file_identity(shard: Path) -> dict[str, Any]:
    if promised := promised_sha256(shard):
        return {"sha256": promised}
    return _state(shard)


def _state(shard: Path) -> dict[str, Any]:
    found = shard.stat()
    return {
        "bytes": found.st_size,
        "modified_ns": found.st_mtime_ns,
        "inode": found.st_ino,
        "samples": sampled_digest(shard),
    }


def _note(shard: Path, cache: Path) -> Path:
    key = json.dumps([str(shard.resolve()), _state(shard)], sort_keys=True)
    return cache / _VERIFIED / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _remember(shard: Path, cache: Path) -> None:
    note = _note(shard, cache)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"file": str(shard.resolve()), **_state(shard)}) + "\n")
    except OSError:
        return  # a cache that cannot be written costs the check once more, not the verification


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause
