"""The cyclic garbage collector, paused where it would walk all of a process's objects to free nothing.

torch and transformers leave a million objects that live as long as the process. Making a model's modules and tensors
is enough to have the collector look through all of them once, which takes a fifth of a second in the middle of a load:
longer than a warm load of a few gigabytes. What was made meanwhile is looked at afterwards, as it always is.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ladezeit.system.fork import renew_after_fork

_LOCK = threading.Lock()
renew_after_fork(_LOCK)
_paused_by = 0
_was_on = False


@contextmanager
def pause_gc() -> Iterator[None]:
    """Pause the collector in the block, if it is on; it goes on when the last of several threads has left its block."""
    global _paused_by, _was_on
    with _LOCK:
        if _paused_by == 0:
            _was_on = gc.isenabled()
            gc.disable()
        _paused_by += 1
    try:
        yield
    finally:
        with _LOCK:
            _paused_by -= 1
            if _paused_by == 0 and _was_on:
                gc.enable()
