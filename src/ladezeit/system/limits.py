"""How much of the machine this process may use: memory and processors, with the limits of its control groups.

What a container may use is less than what the machine has, and the machine's own numbers do not say so. Both versions
of control groups are read; `root` stands for the file system's root.
"""

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from ladezeit.errors import MEMORY_FULL

_ROOT = Path("/")
#: Above this a limit means none: version 1 writes the largest number of pages it can count.
_NO_LIMIT = 2**60
#: Processors that copy as fast as a link of 16 PCIe lanes of the fifth generation takes it: 6.5 GB/s each.
_FILL_A_LINK = 8


@dataclass(frozen=True)
class _Names:
    """What a version of control groups calls its files, and the parts of its memory that are given back when needed."""

    limit: str
    usage: str
    kills: str
    reclaimable: tuple[str, ...]


_VERSION_2 = _Names(
    "memory.max", "memory.current", "memory.events", ("active_file", "inactive_file", "slab_reclaimable")
)
_VERSION_1 = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.oom_control",
    ("total_active_file", "total_inactive_file"),
)


def memory_limit_bytes(root: Path = _ROOT) -> int:
    """Return the most memory this process may use: the machine's, or less where a control group says so."""
    limits = [limit for group, names in _memory_groups(root) if (limit := _number(group / names.limit)) is not None]
    return min([psutil.virtual_memory().total, *limits])


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Return how much memory can still be had without swapping; page cache that can be given back counts as free."""
    free = psutil.virtual_memory().available
    for group, names in _memory_groups(root):
        limit, usage = _number(group / names.limit), _number(group / names.usage)
        if limit is not None and limit < _NO_LIMIT and usage is not None:
            free = min(free, limit - usage + _reclaimable(group, names))
    return max(0, free)


def available_cpus(root: Path = _ROOT) -> int:
    """Return how many processors this process may use: its affinity, or less (rounded up) where a quota says so."""
    cpus = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, ""):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus = min(cpus, int(quota) / int(period))
    for group in _groups(root, "cpu"):
        quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            cpus = min(cpus, quota_us / period_us)
    return max(1, math.ceil(cpus))


def near_cpus(pci_address: str | None, root: Path = _ROOT) -> frozenset[int]:
    """Return the processors of this process on the same side of the machine as a device, whose memory it reaches best.

    None are returned where the device or its side is not known, where all are near, and where the near ones are so few
    that to leave the others alone would cost more than the way to the other side.
    """
    ours = os.sched_getaffinity(0)
    near = frozenset(_listed(_text(root / "sys/bus/pci/devices" / (pci_address or "none") / "local_cpulist")) & ours)
    enough = len(near) >= _FILL_A_LINK or 2 * len(near) >= len(ours)
    return near if enough and near != ours else frozenset()


def kernel_kills(root: Path = _ROOT) -> int:
    """Return how many processes of this control group the kernel's out-of-memory killer has ended since boot.

    Of the whole machine where there are no groups, or none counts; 0 where the kernel does not say.
    """
    counters = [group / names.kills for group, names in _memory_groups(root)]
    kills = (_counts(path).get("oom_kill") for path in (*counters, root / "proc/vmstat"))
    return next((count for count in kills if count is not None), 0)


def ended_for_memory(exit_code: int, kills_before: int) -> bool:
    """Return whether a process ended because memory ran out: it said so, or the kernel ended it.

    Args:
        exit_code: negative for a signal.
        kills_before: what `kernel_kills` returned before the process started.
    """
    return exit_code == MEMORY_FULL or (exit_code == -signal.SIGKILL and kernel_kills() > kills_before)


def _listed(text: str) -> set[int]:
    """Return the numbers of a list as the kernel writes it: ``0-3,8``."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _memory_groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    for group in _groups(root, ""):
        yield group, _VERSION_2
    for group in _groups(root, "memory"):
        yield group, _VERSION_1


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all groups above it; `controller` is empty for version 2.

    Inside a container the path may be the host's and not exist here: the mount's own root is the group then.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        names = {controllers, controller} if controller else {"", "unified"}
        for name in sorted(names):
            base = root / "sys/fs/cgroup" / name
            inside = Path(path.strip("/"))
            for part in (inside, *inside.parents):
                if (base / part).is_dir():
                    yield base / part


def _reclaimable(group: Path, names: _Names) -> int:
    counts = _counts(group / "memory.stat")
    return sum(counts.get(key, 0) for key in names.reclaimable)


def _counts(path: Path) -> dict[str, int]:
    """Return the numbers of a file of names and numbers, one pair a line."""
    pairs = (line.partition(" ") for line in _text(path).splitlines())
    return {name: int(number) for name, _, number in pairs if number.isdigit()}


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.removeprefix("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
