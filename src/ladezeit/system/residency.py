"""Which parts of a file are in the page cache, asked without reading any of them.

cachestat counts the pages of a range. File systems stacked on others keep no cache of their own, so it would always say
"none" there: mincore looks through a mapping instead. Both answer only a file's owner and those who may write it; for
others a few bytes are read on the condition that nobody waits for them, which brings those pages in.

Counting gigabytes takes tens of milliseconds. A load, whose clock runs, asks about a few pages of each part, and asks
no further about a part of which one is missing.
"""

import math
import mmap
import os
import random
import re
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

from ladezeit.system.libc import count_cached_pages, count_mapped_pages, map_memory, unmap_memory

#: File systems that pass files through from another one: cachestat sees their own, always empty, cache.
_STACKED = ("overlay", "aufs")
_PAGE = mmap.PAGESIZE
#: Asked of mincore at once, which writes a byte a page; a multiple of a page.
_WINDOW_BYTES = 2**30
_SAMPLES = 64


def may_ask(path: Path) -> bool:
    """Return whether the kernel answers truly: to strangers, mincore calls every page resident."""
    return os.access(path, os.W_OK) or path.stat().st_uid == os.geteuid()


def sampled_share(paths: Sequence[Path]) -> float:
    """Return about which share of `paths` is in the page cache, by `_SAMPLES` pages in each; NaN where nobody tells."""
    shares: list[float] = []
    for path in paths:
        size = path.stat().st_size
        steps = [place * size // _SAMPLES // _PAGE * _PAGE for place in range(_SAMPLES)]
        with path.open("rb", buffering=0) as file:
            found = resident_pages(file.fileno(), path, _pages_at(steps)) if size and may_ask(path) else None
        if found is None:
            return math.nan
        shares.append(sum(found[0]) / len(found[0]))
    return sum(shares) / len(shares)


def resident_ranges(descriptor: int, path: Path, ranges: Sequence[tuple[int, int]]) -> tuple[list[bool], str]:
    """Return whether each range is in the page cache, by four of its pages, and who said so.

    Args:
        descriptor: the file, open to be read.
        path: the same file's name, to look up its file system and whether we are told the truth about it.
        ranges: begins, multiples of a page, and ends, in bytes, in order.
    """
    ours = os.access(path, os.W_OK) or os.fstat(descriptor).st_uid == os.geteuid()
    found = resident_pages(descriptor, path, [(begin, begin + _PAGE) for begin, _ in ranges]) if ours else None
    if found is None:
        return _by_reading(descriptor, ranges), "reading"
    begun, teller = found
    if not any(begun):
        return [False] * len(begun), teller
    asked = [_further(begin, end) if there else [] for there, (begin, end) in zip(begun, ranges, strict=True)]
    rest = resident_pages(descriptor, path, [page for places in asked for page in _pages_at(places)])
    answers = iter(rest[0] if rest is not None else ())
    in_memory = [sum(next(answers, 0) for _ in places) == len(places) for places in asked]
    return [bool(there) and all_there for there, all_there in zip(begun, in_memory, strict=True)], teller


class ResidencyProbe:
    """Says of one range of an open file after another whether it is in the page cache, from any thread.

    It is for those who ask just before they read: one call of cachestat counts 8 MiB in 2 to 4 µs where the file system
    has large folios, without the interpreter's lock.

    Args:
        descriptor: of the file.
        path: where it lies.
    """

    #: A range of which no more than this share is missing is there: the kernel fetches so few pages sooner than a
    #: direct read brings all of them again.
    _MISSING_SHARE = 0.02

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._ours = os.access(path, os.W_OK) or os.fstat(descriptor).st_uid == os.geteuid()
        self._by_mincore: bool | None = None
        self._reading = threading.Lock()
        #: Who answered last: ``cachestat``, ``mincore`` or ``reading``; None before the first question.
        self.teller: str | None = None

    def is_resident(self, begin: int, end: int) -> bool:
        """Return whether the bytes `begin` to `end` are in the page cache, but for a few pages."""
        pages = self._pages(begin, end) if self._ours else None
        if pages is not None:
            return pages >= (1 - self._MISSING_SHARE) * -(-(end - begin) // _PAGE)
        self.teller = "reading"
        with self._reading:  # it changes how the descriptor reads ahead, and back
            return _by_reading(self._descriptor, [(begin, end)])[0]

    def _pages(self, begin: int, end: int) -> int | None:
        if not self._by_mincore:
            found = count_cached_pages(self._descriptor, [(begin, end)])
            if found is not None and found[0] == 0 and self._by_mincore is None:
                # Looking up the file system costs more than all else here, so it is asked once, where it matters.
                self._by_mincore = filesystem_type(self._path) in _STACKED
            if found is not None and not self._by_mincore:
                self.teller = "cachestat"
                return found[0]
        found = pages_by_mincore(self._descriptor, [(begin, end)])
        self.teller = "mincore"
        return None if found is None else found[0]


def _further(begin: int, end: int) -> list[int]:
    """Return the offsets of a range's last page and of two between; fewer where it has fewer than four."""
    pages = -(-(end - begin) // _PAGE)
    return [begin + page * _PAGE for page in sorted({pages // 3, pages - 1 - pages // 3, pages - 1} - {0})]


def _pages_at(places: Sequence[int]) -> list[tuple[int, int]]:
    return [(place, place + _PAGE) for place in places]


def resident_pages(descriptor: int, path: Path, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], str] | None:
    """Return how many pages of each range are in the page cache, and who said so; None where nobody does.

    For who may not ask (`may_ask`) the answer is wrong: every page.
    """
    pages = count_cached_pages(descriptor, ranges)
    # Looking up the file system takes as long as all else here: a cache that is not empty needs no second opinion.
    if pages is not None and (any(pages) or filesystem_type(path) not in _STACKED):
        return pages, "cachestat"
    pages = pages_by_mincore(descriptor, ranges)
    return None if pages is None else (pages, "mincore")


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that `path` lies on, as the system calls it (ext4, overlay, tmpfs, …)."""
    real = f"{os.path.realpath(path)}/"
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split(" ")[4]
        if "\\" in mount:
            mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount)  # \040 is a space
        if real.startswith(f"{mount.rstrip('/')}/") and len(mount) >= best:
            best, kind = len(mount), after.split(" ")[0]
    return kind


def pages_by_mincore(descriptor: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return the pages of each range in the cache; None where the file cannot be mapped or the kernel does not tell."""
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes == 0:
        return [0] * len(ranges)
    try:
        address = map_memory(file_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor=descriptor)
    except OSError:
        return None
    try:
        inside = [(begin, min(end, file_bytes)) for begin, end in ranges]
        return count_mapped_pages(address, inside, _WINDOW_BYTES)
    finally:
        unmap_memory(address, file_bytes)


def _by_reading(descriptor: int, ranges: Sequence[tuple[int, int]]) -> list[bool]:
    """Try a byte of four pages of each range, the first of which that is missing decides.

    Who asks for a byte without waiting starts to read its page all the same. So the pages are others every time: those
    that the last load has asked about are there since. And a fast disk may have answered before the kernel looks: what
    counts is whether this thread has read from the disk.
    """
    byte, chance = bytearray(1), random.Random()

    def there(page: int) -> bool:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        try:
            count = os.preadv(descriptor, [byte], page * _PAGE, os.RWF_NOWAIT)
        except OSError:  # not there, or a file system that cannot tell
            return False
        return count == 1 and resource.getrusage(resource.RUSAGE_THREAD).ru_inblock == before

    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel would read ahead of a byte that is missing
    found = []
    for begin, end in ranges:
        pages = range(begin // _PAGE, -(-end // _PAGE))
        found.append(all(there(page) for page in chance.sample(pages, min(4, len(pages)))))
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    return found
