"""What lies in ladezeit's cache folder: made checkpoints, converted ones, what proofs rest on, locks."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ladezeit.checkpoint.store import IDENTITY_FILE


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


def contents(cache: Path) -> list[CacheEntry]:
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
