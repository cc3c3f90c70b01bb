"""Brings files into the page cache: only what is not there yet, with a few reads in flight, no faster than allowed."""

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ladezeit.system.page_cache import open_file, read_at
from ladezeit.system.residency import may_ask, resident_pages

#: Read at once: large enough for any disk, small enough for an even rate.
_PIECE_BYTES = 4 * 2**20
_READERS = 4


@dataclass(frozen=True)
class FileRange:
    """Bytes ``begin`` to ``end`` of a file, some of which are not in the page cache."""

    path: Path
    begin: int
    end: int


def missing_ranges(paths: Sequence[Path]) -> list[FileRange]:
    """Return what of `paths` has pages that are not in the page cache; all of it where the system does not tell."""
    missing = []
    for path in paths:
        with open_file(path) as descriptor:
            size = os.fstat(descriptor).st_size
            ranges = [(begin, min(begin + _PIECE_BYTES, size)) for begin in range(0, size, _PIECE_BYTES)]
            found = resident_pages(descriptor, path, ranges) if ranges and may_ask(path) else None
        pages = found[0] if found is not None else [0] * len(ranges)
        missing += [
            FileRange(path, begin, end)
            for (begin, end), there in zip(ranges, pages, strict=True)
            if there < -(-(end - begin) // mmap.PAGESIZE)
        ]
    return missing


def read_ranges(
    pieces: Sequence[FileRange],
    bytes_per_s: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Read all `pieces` through the page cache and return how many bytes that were.

    Args:
        pieces: see `missing_ranges`.
        bytes_per_s: the most that is read in a second over all threads, on average from the start; None for no limit.
        on_progress: bytes done and in all, after each piece.

    Raises:
        CheckpointError: a file cannot be read, or became shorter.
    """
    pace = _Pace(bytes_per_s)
    total = sum(piece.end - piece.begin for piece in pieces)
    buffers = threading.local()
    done = 0
    with ThreadPoolExecutor(_READERS, thread_name_prefix="prefetch") as pool:
        try:
            for size in pool.map(lambda piece: _bring(piece, pace, buffers), pieces):
                done += size
                on_progress(done, total)
        except BaseException:
            pace.end_pace()  # who interrupts does not wait for hours of slow reading
            pool.shutdown(cancel_futures=True)
            raise
    return done


class _Pace:
    """Makes each read wait until the ones before it have had their time at the rate that is allowed."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._next_s = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def wait(self, size: int) -> None:
        if self._bytes_per_s is None:
            return
        with self._lock:
            start_s = max(self._next_s, time.monotonic())
            self._next_s = start_s + size / self._bytes_per_s
        self._ended.wait(self._next_s - time.monotonic())  # after its time: a short load is not a burst

    def end_pace(self) -> None:
        self._ended.set()


def _bring(piece: FileRange, pace: _Pace, buffers: threading.local) -> int:
    if not hasattr(buffers, "one"):
        buffers.one = mmap.mmap(-1, _PIECE_BYTES)
    pace.wait(piece.end - piece.begin)
    with open_file(piece.path) as descriptor, memoryview(buffers.one) as view:
        position = piece.begin
        while position < piece.end:
            position += read_at(descriptor, view[: piece.end - position], position, piece.path)
    return piece.end - piece.begin
