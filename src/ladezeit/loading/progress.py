"""How far the reading of a checkpoint is, in words, and not more often than somebody can read them."""

import time
from collections.abc import Callable

#: A message a second wakes whoever listens so rarely that the load does not notice.
_INTERVAL_S = 1.0


def throttle_progress(on_progress: Callable[[str], None]) -> Callable[[int, int, float], None]:
    """Return a `Progress` that passes on the state of the reading to `on_progress`, as text and once a second at
    most.
    """
    next_s = time.monotonic() + _INTERVAL_S

    def progress(done: int, total: int, seconds: float) -> None:
        nonlocal next_s
        now = time.monotonic()
        if now >= next_s:
            next_s = now + _INTERVAL_S
            on_progress(format_progress(done, total, seconds))

    return progress


def format_progress(done: int, total: int, seconds: float) -> str:
    """Return bytes done and in all, the rate so far, and how long the rest takes at that rate."""
    text = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
    if not done or seconds <= 0:
        return text
    rate = done / seconds
    return f"{text} at {rate / 1e9:.2f} GB/s, {(total - done) / rate:.0f} s left"
