"""Who waits for a large model sees bytes, rate and the time left, and the load does not notice."""

import pytest

from ladezeit.loading.progress import format_progress, throttle_progress


def test_bytes_rate_and_time_left_are_told() -> None:
    """The line says what a person wants to know."""
    assert format_progress(1_500_000_000, 3_000_000_000, 1.0) == "1.5 of 3.0 GB at 1.50 GB/s, 1 s left"
    assert format_progress(0, 3_000_000_000, 0.0) == "0.0 of 3.0 GB"


def test_a_load_of_thousands_of_reads_tells_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress never wakes the listener more often than somebody can read."""
    now = 100.0
    monkeypatch.setattr("ladezeit.loading.progress.time.monotonic", lambda: now)
    told: list[str] = []
    progress = throttle_progress(told.append)
    for step in range(1000):
        now = 100.0 + step * 0.0035
        progress(step, 1000, step * 0.0035 or 1e-9)
    assert len(told) == 3
