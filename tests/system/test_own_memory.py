"""What a process has in memory is read once before a load: nothing is added to it, and nothing of it is left out."""

import ctypes
import mmap
import os
from pathlib import Path

import psutil
import pytest

from ladezeit.system import memory_warmup
from ladezeit.system.memory_warmup import touch_own_memory

MIB = 2**20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def test_all_that_is_in_memory_is_read_and_nothing_more_becomes_so(tmp_path: Path) -> None:
    """A load is measured in the process that imported its libraries, not in one that was changed by looking at it."""
    touch_own_memory()  # brings in what it needs itself
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    with (tmp_path / "file").open("rb") as file, mmap.mmap(-1, 64 * MIB, flags=PRIVATE) as memory:
        memory[: 16 * MIB] = bytes(16 * MIB)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:  # of which no page is looked at
            before = _resident()
            touched = touch_own_memory()
            assert abs(_resident() - before) < 4 * MIB
            assert touched == pytest.approx(before, rel=0.1)
            assert len(mapped) == 64 * MIB


def test_every_stretch_in_memory_is_found_to_the_page() -> None:
    """Pages that are there between pages that are not are read too."""
    with mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=PRIVATE) as memory:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in (1, 2, 5):
            memory[page * mmap.PAGESIZE] = 1
        view = ctypes.c_char.from_buffer(memory)
        begin, size = ctypes.addressof(view), len(memory)
        del view
        found = memory_warmup._resident()
        inside = [(first - begin, last - begin) for first, last in found if begin <= first < begin + size]
        assert inside == [(mmap.PAGESIZE, 3 * mmap.PAGESIZE), (5 * mmap.PAGESIZE, 6 * mmap.PAGESIZE)]


def test_where_the_system_does_not_let_us_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hardened system measures all the same."""

    def refused(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "preadv", refused)
    assert touch_own_memory() == 0
    monkeypatch.undo()
    monkeypatch.setattr(os, "pread", refused)
    assert touch_own_memory() == 0


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
