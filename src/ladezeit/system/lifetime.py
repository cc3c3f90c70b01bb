"""Keeps processes from outliving those that started them; imports so little that any process can ask for it first."""

import signal

from ladezeit.system.libc import set_parent_death_signal


def die_with_parent() -> None:
    """Ask the kernel to end this process when the process that started it dies: no load survives its supervisor."""
    set_parent_death_signal(signal.SIGKILL)
