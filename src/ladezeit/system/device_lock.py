"""One sample at a time on a device: two loads on one GPU (or on one host's memory and disk) are both measured wrong.

A sweep holds the device against other sweeps while its samples, which a launcher may run in processes of their own,
hold it against each other: two locks, so that the one does not wait for the other.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ladezeit.redaction import redact_text
from ladezeit.system.files import cache_folder, hold_lock
from ladezeit.system.gpus import ResolvedDevice

Against = Literal["samples", "sweeps"]


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

    A process may enter it again and again, in any thread; the last one out gives it back. The kernel gives it back
    when the process dies, whatever it dies of.

    Args:
        device: what to hold.
        waiting: told who holds it, once for every holder that is waited for (None: it has not said yet who it is).
        folder: where the lock's file lies; ladezeit's cache if None.
        against: whether other samples or other sweeps have to wait.
    """
    path = lock_path(device, folder, against)
    told: list[Holder | None] = []

    def tell() -> None:
        if (holder := _holder(path)) not in told:
            told.append(holder)
            waiting(holder)

    with hold_lock(path, tell, shared_by_threads=True):
        with path.open("r+", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Holder(os.getpid(), redact_text(" ".join(sys.orig_argv))))))
            file.truncate()
        yield


def _holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
