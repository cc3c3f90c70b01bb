"""Which parts of a file are in the page cache, asked without reading any of them.

cachestat answers a range in microseconds. File systems stacked on others keep no cache of their own, so it would always
say "none" there: mincore looks through a mapping instead. Both answer only a file's owner and those who may write it;
for others a few bytes of each range are read on the condition that nobody waits for them.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from ladezeit.checkpoint.page_cache import filesystem

_CACHESTAT = 451  # the same number on every architecture
_STACKED = ("overlay", "aufs")
_PAGE = mmap.PAGESIZE
#: Mapped at once for mincore; a multiple of a page.
_WINDOW_BYTES = 2**30

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long


def resident_shares(descriptor: int, path: Path, ranges: Sequence[tuple[int, int]]) -> tuple[list[float], str]:
    """Return which share of each range is in the page cache (0.0 to 1.0), and who said so.

    Args:
        descriptor: the file, open to be read.
        path: the same file's name, to look up its file system and whether we are told the truth about it.
        ranges: begins, multiples of a page, and ends, in bytes, in order.
    """
    status = os.fstat(descriptor)
    if not (os.access(path, os.W_OK) or status.st_uid == os.geteuid()):
        return _by_reading(descriptor, ranges), "reading"  # to strangers, mincore calls every page resident
    pages = _by_cachestat(descriptor, ranges)
    # Looking up the file system takes as long as all else here: a cache that is not empty needs no second opinion.
    if pages is not None and (any(pages) or filesystem(path) not in _STACKED):
        return _shares(pages, ranges), "cachestat"
    pages = _by_mincore(descriptor, status.st_size, ranges)
    return (_shares(pages, ranges), "mincore") if pages is not None else (_by_reading(descriptor, ranges), "reading")


def _shares(pages: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[float]:
    return [min(1.0, count / -(-(end - begin) // _PAGE)) for count, (begin, end) in zip(pages, ranges, strict=True)]


def _by_cachestat(descriptor: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    asked, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()  # offset, length; cached, dirty, …

    def pages(begin: int, end: int) -> int | None:
        asked[0], asked[1] = begin, end - begin
        if _libc.syscall(_CACHESTAT, descriptor, ctypes.addressof(asked), ctypes.addressof(found), 0) != 0:
            return None
        return int(found[0])

    counts = []
    if pages(ranges[0][0], ranges[-1][1]) == 0:  # most files are wholly cold or wholly warm: no need to ask for each
        return [0] * len(ranges)
    for begin, end in ranges:
        count = pages(begin, end)
        if count is None:
            return None
        counts.append(count)
    return counts


def _by_mincore(descriptor: int, file_bytes: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    flags = bytearray()
    for start in range(0, file_bytes, _WINDOW_BYTES):
        length = min(_WINDOW_BYTES, file_bytes - start)
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
        if address in (None, ctypes.c_void_p(-1).value):
            return None
        try:
            window = ctypes.create_string_buffer(-(-length // _PAGE))
            if _libc.mincore(address, length, window) != 0:
                return None
        finally:
            _libc.munmap(address, length)
        flags += window.raw
    return [flags.count(1, begin // _PAGE, -(-end // _PAGE)) for begin, end in ranges]


def _by_reading(descriptor: int, ranges: Sequence[tuple[int, int]]) -> list[float]:
    """Try one byte at both ends and in the middle of each range; what would have to wait for the disk is not there."""
    byte = bytearray(1)
    shares = []
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel would read ahead of a byte that is missing
    for begin, end in ranges:
        found = 0
        for offset in (begin, (begin + end) // 2, end - 1):
            try:
                found += os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT)
            except OSError:  # not there, or a file system that cannot tell
                continue
        shares.append(found / 3)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
    return shares
