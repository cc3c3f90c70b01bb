"""Which parts of a file are in the page cache: the three ways to ask agree, and the right one is asked."""

import math
import os
from pathlib import Path

import pytest

from ladezeit.system import page_cache, residency

PAGE = residency._PAGE
RANGES = [(0, 64 * PAGE), (64 * PAGE, 128 * PAGE), (128 * PAGE, 191 * PAGE + 5)]


@pytest.fixture
def half_warm(tmp_path: Path) -> Path:
    """A file of which the middle range alone is in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(RANGES[-1][1]))
    page_cache.drop_pages([path])
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(64 * PAGE)
        file.read(64 * PAGE)
    return path


def test_all_ways_to_ask_agree(half_warm: Path) -> None:
    """What a load decides does not depend on which question the kernel answers."""
    with half_warm.open("rb") as file:
        descriptor = file.fileno()
        by_cachestat = residency.count_cached_pages(descriptor, RANGES)
        assert residency.pages_by_mincore(descriptor, RANGES) == [0, 64, 0]
        assert by_cachestat in (None, [0, 64, 0])  # None before Linux 6.5
        assert residency._by_reading(descriptor, RANGES) == [False, True, False]


def test_a_stacked_file_system_is_looked_through(half_warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, whose files come through an overlay, a warm file is seen as warm."""
    monkeypatch.setattr(residency, "filesystem_type", lambda path: "overlay")
    monkeypatch.setattr(residency, "count_cached_pages", lambda descriptor, ranges: [0] * len(ranges))
    with half_warm.open("rb") as file:
        assert residency.resident_pages(file.fileno(), half_warm, RANGES) == ([0, 64, 0], "mincore")


def test_mincore_counts_across_its_windows(half_warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files larger than what is mapped at once are counted right."""
    monkeypatch.setattr(residency, "_WINDOW_BYTES", 10 * PAGE)
    with half_warm.open("rb") as file:
        assert residency.pages_by_mincore(file.fileno(), RANGES) == [0, 64, 0]


def test_a_load_asks_without_reading(half_warm: Path) -> None:
    """Asking which parts are in memory brings no other part in: what was cold is still cold afterwards."""
    with half_warm.open("rb") as file:
        for _ in range(2):
            found, teller = residency.resident_ranges(file.fileno(), half_warm, RANGES)
            assert found == [False, True, False]
            assert teller in ("cachestat", "mincore")
            assert residency.sampled_share([half_warm]) == pytest.approx(1 / 3, abs=0.05)
        assert residency.pages_by_mincore(file.fileno(), RANGES) == [0, 64, 0]


def test_where_nobody_answers_a_few_bytes_are_read(half_warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an old or locked-down kernel the choice by residency is still made."""
    monkeypatch.setattr(residency, "count_cached_pages", lambda descriptor, ranges: None)
    monkeypatch.setattr(residency, "pages_by_mincore", lambda descriptor, ranges: None)
    with half_warm.open("rb") as file:
        assert residency.resident_ranges(file.fileno(), half_warm, RANGES) == ([False, True, False], "reading")
    assert math.isnan(residency.sampled_share([half_warm]))


def test_a_disk_that_answers_at_once_is_no_cache(half_warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is faster than the kernel's look, a cold file of somebody else is cold all the same."""
    waiting = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset, flags: waiting(descriptor, buffers, offset))
    with half_warm.open("rb") as file:
        assert residency._by_reading(file.fileno(), RANGES) == [False, True, False]


def test_a_file_of_somebody_else_that_was_asked_about_stays_cold(tmp_path: Path) -> None:
    """Asking brings pages in: the next load, which asks about the same file, still finds it cold."""
    path, large = tmp_path / "file", [(begin * 512 * PAGE, (begin + 1) * 512 * PAGE) for begin in range(8)]
    path.write_bytes(bytes(large[-1][1]))
    page_cache.drop_pages([path])
    with path.open("rb") as file:
        for _ in range(3):
            assert residency._by_reading(file.fileno(), large) == [False] * 8
