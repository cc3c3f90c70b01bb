"""Locks that are new after a fork: one that another thread held is never given back in the child."""

import os
from typing import Any


def renew_after_fork(lock: Any) -> None:
    """Have `lock`, a `threading.Lock` or `RLock` that lives as long as the process, free in each child of a fork."""
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # as the standard library does with its own
