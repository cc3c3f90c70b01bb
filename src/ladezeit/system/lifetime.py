"""Keeps processes from outliving those that started them, and says how they ended.

Imports nothing that takes time, so that any process can ask for it first.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from ladezeit.system.libc import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, control_process

#: The most that is waited for processes that were killed: one that hangs in a driver may not end at all.
_END_S = 10.0


def die_with_parent() -> None:
    """Ask the kernel to end this process when the process that started it dies: no load survives its supervisor."""
    control_process(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def end_descendants() -> Iterator[None]:
    """End, when the block is left, all that its processes started, daemons and their orphans included.

    The processes that the block itself starts have to have sessions of their own. While it runs this process adopts
    orphans, as ``init`` would, and afterwards all its new children in other sessions are ended: no process ever gets
    back into a session that it left, so what other threads start meanwhile, in this one, is not touched.
    """
    import psutil

    def strays() -> list[psutil.Process]:
        children = [child for child in psutil.Process().children() if child not in before]
        return [child for child in children if _session(child.pid) not in (None, own)]

    before, own = set(psutil.Process().children()), os.getsid(0)
    control_process(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        deadline = time.monotonic() + _END_S
        while (left := strays()) and time.monotonic() < deadline:  # whose parent is killed is adopted next
            for stray in left:
                with contextlib.suppress(psutil.Error):
                    stray.kill()
            psutil.wait_procs(left, timeout=_END_S / 10)
        control_process(PR_SET_CHILD_SUBREAPER, 0)


def signal_name(number: int) -> str:
    """Return what a signal is called; those for real-time use have no names of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}" if number > signal.SIGRTMIN else f"signal {number}"


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None
