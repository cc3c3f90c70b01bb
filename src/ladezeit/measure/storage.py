"""Which filesystem and block device a checkpoint lies on, as the kernel tells."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo; `number` is the device's ``major:minor``, `options` those of mount and filesystem."""

    point: Path
    filesystem: str
    source: str
    options: str
    number: str


def describe_storage(path: Path) -> dict[str, Any]:
    """Return the mount that holds `path` and the disk under it; empty where the kernel does not tell."""
    try:
        mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(encoding="utf-8"))
    except OSError:
        return {}
    mount = mount_of(path.resolve(), mounts)
    if mount is None:
        return {}
    return {
        "mount": str(mount.point),
        "filesystem": mount.filesystem,
        "source": mount.source,
        "options": mount.options,
        "disk": _disk(mount.number),
    }


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Parse the text of ``/proc/<pid>/mountinfo`` (proc_pid_mountinfo(5))."""
    mounts = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        options = ",".join(dict.fromkeys(f"{before[5]},{after[2]}".split(",")))
        mounts.append(Mount(Path(_unescaped(before[4])), after[0], _unescaped(after[1]), options, before[2]))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """Return the mount with the longest point above `path`; of several on one point the last, which covers them."""
    holding = [mount for mount in mounts if path == mount.point or mount.point in path.parents]
    return max(reversed(holding), key=lambda mount: len(mount.point.parts), default=None)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), field)


def _disk(number: str) -> dict[str, Any] | None:
    """Describe the whole disk that a device number belongs to; None where there is none (tmpfs, NFS, overlay)."""
    link = Path("/sys/dev/block") / number
    if not link.exists():
        return None
    folder = Path(os.path.realpath(link))
    if (folder / "partition").exists():
        folder = folder.parent
    rotational = _text(folder / "queue/rotational")
    return {
        "name": folder.name,
        "model": _text(folder / "device/model"),
        "rotational": None if rotational is None else rotational == "1",
        "read_ahead_kib": _number(folder / "queue/read_ahead_kb"),
        "scheduler": _text(folder / "queue/scheduler"),
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None
