"""Checkpoints that ladezeit makes itself, kept in its cache folder: each is there whole or not at all.

A checkpoint is written into a hidden folder beside its place, synced to disk, given its identity file last, and
renamed. One process makes it, under a lock that the system releases if that process dies; others wait and use it.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ladezeit.errors import CheckpointError
from ladezeit.system.files import hold_lock

IDENTITY_FILE = "ladezeit.json"
_SCHEMA = 1
#: Kept free beyond what is written, in bytes: a file system needs some for itself.
_RESERVE_BYTES = 64 * 1024**2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOVE = "Free some, or set LADEZEIT_CACHE to a folder on a larger disk"

#: Told what is being done, how many bytes of it are done, and how many there are (0 where that is not known).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recipe:
    """What a made checkpoint is made from; equal `kind` and `identity` mean equal content.

    `name` is for people only; `needed_bytes` is how much will be written, 0 where that is found out later.
    """

    name: str
    kind: str
    identity: dict[str, Any]
    needed_bytes: int = field(default=0, compare=False)

    @property
    def folder_name(self) -> str:
        """The folder's name in the cache: readable, and different for different content."""
        content = json.dumps([self.kind, self.identity], sort_keys=True)
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip(".-") or self.kind
        return f"{readable[:80]}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def find_entry(cache: Path, recipe: Recipe) -> Path | None:
    """Return the folder of `recipe` in `cache` if it is there with all files in full length; changes nothing."""
    folder = cache / recipe.folder_name
    try:
        said = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in said.pop("files").items()}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return folder if whole and said == _identity(recipe) else None


def build_entry(cache: Path, recipe: Recipe, write: Callable[[Path], None], progress: Progress) -> Path:
    """Return the folder of `recipe`, calling ``write(empty folder)`` to make it if it is not there yet.

    Raises:
        CheckpointError: the cache cannot be written or is too small. Nothing is left behind, whatever is raised.
    """
    if there := find_entry(cache, recipe):
        return there
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # `cache`: said once, not at every poll.
        waiting = functools.cache(lambda: progress("waiting for another process that makes this checkpoint", 0, 0))
        with hold_lock(_lock_file(cache, recipe.folder_name), waiting):
            if there := find_entry(cache, recipe):
                return there
            remove_leftovers(cache, own=recipe.folder_name)
            check_space(cache, recipe.needed_bytes)
            return _make(cache, recipe, write)
    except OSError as cause:
        if cause.errno in _FULL:
            raise CheckpointError(
                f"model={recipe.name}: the disk of {cache} is full: {_free_bytes(cache)} bytes are free. {_MOVE}"
            ) from cause
        raise CheckpointError(
            f"model={recipe.name}: its checkpoint cannot be written to {cache}: {cause.strerror} ({cause.filename}). "
            f"Set LADEZEIT_CACHE to a folder that can be written"
        ) from cause


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise `CheckpointError` if the disk of `folder` has no room for `needed_bytes` and a small reserve."""
    free = _free_bytes(folder)
    if needed_bytes and free < needed_bytes + _RESERVE_BYTES:
        raise CheckpointError(
            f"the checkpoint needs {needed_bytes} bytes ({needed_bytes / 1e9:.2f} GB) in {folder}, where {free} bytes "
            f"({free / 1e9:.2f} GB) are free. {_MOVE}"
        )


def remove_leftovers(cache: Path, own: str) -> None:
    """Remove what dead processes left half-written; the caller holds the lock of `own`."""
    for path in cache.glob(".*.partial"):
        name = path.name[1:].rsplit(".", 2)[0]
        if name == own:
            shutil.rmtree(path, ignore_errors=True)
            continue
        with (
            contextlib.suppress(OSError),
            hold_lock(_lock_file(cache, name), wait=False),
        ):  # refused while its maker lives
            shutil.rmtree(path, ignore_errors=True)


def _make(cache: Path, recipe: Recipe, write: Callable[[Path], None]) -> Path:
    final = cache / recipe.folder_name
    temporary = cache / f".{recipe.folder_name}.{os.getpid()}.partial"
    old = cache / f".{recipe.folder_name}.{os.getpid()}-old.partial"
    try:
        temporary.mkdir()
        write(temporary)
        _seal(temporary, recipe)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return final


def _seal(folder: Path, recipe: Recipe) -> None:
    """Bring everything in `folder` to the disk, then the identity file that says it is whole."""
    sizes: dict[str, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    identity = {**_identity(recipe), "files": sizes}
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    _sync(folder / IDENTITY_FILE)
    _sync(folder)


def _identity(recipe: Recipe) -> dict[str, Any]:
    plain = {"schema": _SCHEMA, "kind": recipe.kind, "identity": recipe.identity}
    return dict(json.loads(json.dumps(plain)))


def _lock_file(cache: Path, name: str) -> Path:
    return cache / f".{name}.lock"


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What lies in ladezeit's cache folder: made checkpoints, converted ones, references, locks.


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache: its path below it, the kind of its content, and bytes and number of its files.

    `kind` is that of a made checkpoint (``synthetic``, ``packaged``, ``tensorizer``, …), ``unfinished`` for what is
    being written or was left behind, ``kept`` for files that are looked up: manifests, references, kernels, notes,
    locks.
    """

    name: str
    kind: str
    size_bytes: int
    files: int
    weights: tuple[Path, ...]


def list_entries(cache: Path) -> list[CacheEntry]:
    """Return the entries of the cache folder, the largest first; none where there is no such folder."""
    found: list[CacheEntry] = []
    for folder in _folders(cache):
        if (folder / IDENTITY_FILE).is_file():
            found.append(_entry(cache, folder, _kind(folder)))
        elif folder.name.endswith(".partial"):
            found.append(_entry(cache, folder, "unfinished"))
        else:  # conversions have a folder for each format
            inner = _folders(folder)
            made = [entry for entry in inner if (entry / IDENTITY_FILE).is_file()]
            found += [_entry(cache, entry, _kind(entry)) for entry in made]
            if not made:
                found.append(_entry(cache, folder, "kept"))
    return sorted(found, key=lambda entry: (-entry.size_bytes, entry.name))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _kind(folder: Path) -> str:
    try:
        return str(json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


def _entry(cache: Path, folder: Path, kind: str) -> CacheEntry:
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    sizes = {path: path.lstat().st_size for path in files if os.path.lexists(path)}
    weights = tuple(sorted(path for path in sizes if path.suffix in (".safetensors", ".tensors", ".gguf")))
    return CacheEntry(str(folder.relative_to(cache)), kind, sum(sizes.values()), len(sizes), weights)
