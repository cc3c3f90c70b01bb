"""One sample at a time on a device: two loads on one GPU (or on one host's memory and disk) are both measured wrong.

A sweep holds the device against other sweeps while its samples, which a launcher may run in processes of their own,
hold it against each other: two locks, so that the one does not wait for the other.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

from ladezeit.redaction import redact_text
from ladezeit.system.files import cache_folder
from ladezeit.system.gpus import ResolvedDevice

_POLL_S = 0.2

Against = Literal["samples", "sweeps"]


@dataclass
class _Held:
    file: TextIOWrapper
    entered: int


#: Locks this process holds: a sweep and the samples inside it may both ask.
_held: dict[Path, _Held] = {}
_held_guard = threading.RLock()


@dataclass(frozen=True)
class Holder:
    """The process that holds a device's lock."""

    pid: int
    command: str


def lock_path(device: ResolvedDevice, folder: Path | None = None, against: Against = "samples") -> Path:
    """Return the lock's file: one a GPU, by its UUID, and one a host for the CPU; in ``locks/`` of ladezeit's cache."""
    name = f"gpu-{device.gpu.uuid}" if device.gpu else f"cpu-{socket.gethostname()}"
    return (folder or cache_folder() / "locks") / f"{name.replace('/', '_')}.{against}.lock"


@contextmanager
def lock_device(
    device: ResolvedDevice,
    waiting: Callable[[Holder | None], None] = lambda holder: None,
    folder: Path | None = None,
    against: Against = "samples",
) -> Iterator[None]:
    """Hold `device` for this process, waiting as long as another one has it.

    A process may enter it again and again; the last one out gives it back. The kernel gives it back when the process
    dies, whatever it dies of. A process that was forked off while it is held keeps it too, until that one ends.

    Args:
        device: what to hold.
        waiting: told who holds it, once for every holder that is waited for (None: it has not said yet who it is).
        folder: where the lock's file lies; ladezeit's cache if None.
        against: whether other samples or other sweeps have to wait.
    """
    path = lock_path(device, folder, against)
    with _held_guard:
        if path not in _held:
            _held[path] = _Held(_acquire(path, waiting), 0)
        _held[path].entered += 1
    try:
        yield
    finally:
        with _held_guard:
            _held[path].entered -= 1
            if not _held[path].entered:
                _held.pop(path).file.close()


def _acquire(path: Path, waiting: Callable[[Holder | None], None]) -> TextIOWrapper:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    told: list[Holder | None] = []
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = _holder(path)
                if holder not in told:
                    told.append(holder)
                    waiting(holder)
                time.sleep(_POLL_S)
        file.truncate(0)
        json.dump(asdict(Holder(os.getpid(), redact_text(" ".join(sys.orig_argv)))), file)
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
