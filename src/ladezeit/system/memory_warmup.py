"""Touches memory before a clock starts: what a load will take, and what the process has in memory already.

A virtual machine's host keeps sight of so much of its memory. Where gigabytes were touched a moment ago, it has lost
that of a process's own code and objects, and each page of them costs an exit to the host when it is next used: Python
then ran at half its speed for as long as a load takes. Reading every page once, by way of the kernel, brings them back;
nothing becomes resident that was not.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from ladezeit.system.libc import MADV_POPULATE_WRITE, advise_memory, buffer_address

_PAGE = os.sysconf("SC_PAGESIZE")
_ENTRY_BYTES = 8  # of pagemap, which has one a page
_PRESENT = 63  # the bit of an entry that tells of a page in memory
_CHUNK_BYTES = 2**20
_WINDOW_BYTES = 2**30  # of addresses that are looked up at once: some allocators reserve terabytes

#: How many times what a load takes is to be touched: the kernel does not hand out first what it got back last. After
#: touching just as much, every second load of 3 GB met memory that its host had to fetch: 2.2 s and not 1.3.
TOUCHED_TIMES = 2
_PIECE_BYTES = 256 * 2**20
#: What is left untouched: the page cache is not to be pushed out for this.
_SPARED_BYTES = 512 * 2**20

#: Of x86-64, and of 64-bit ARM with pages of 4 KiB.
LARGE_PAGE = 2 * 2**20


def touch_own_memory() -> int:
    """Read what of this process is in memory; return how many bytes that was, 0 where the system does not let us."""
    done = 0
    if not hasattr(psutil.Process, "memory_maps"):  # where the system has no smaps
        return done
    with suppress(OSError, psutil.Error), Path("/proc/self/mem").open("rb", buffering=0) as memory:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        for begin, end in _resident():
            with suppress(OSError):  # it was unmapped meanwhile, or is a device's
                for at in range(begin, end, _CHUNK_BYTES):
                    done += os.preadv(memory.fileno(), [buffer[: min(_CHUNK_BYTES, end - at)]], at)
    return done


def _resident() -> Iterator[tuple[int, int]]:
    """Yield first and last address of each stretch of this process's memory that is in the machine's."""
    import numpy as np

    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for begin, end in _mappings():
            raw = os.pread(pagemap.fileno(), (end - begin) // _PAGE * _ENTRY_BYTES, begin // _PAGE * _ENTRY_BYTES)
            there = np.frombuffer(raw, dtype=np.uint64) >> np.uint64(_PRESENT)
            edges = np.flatnonzero(np.diff(there.astype(np.int8), prepend=0, append=0))
            for first, last in edges.reshape(-1, 2).tolist():
                yield begin + first * _PAGE, begin + last * _PAGE


def _mappings() -> Iterator[tuple[int, int]]:
    """Yield first and last address of what may be read and has pages in memory, in parts; a device's is left alone."""
    for mapping in psutil.Process().memory_maps(grouped=False):
        if mapping.rss and "r" in mapping.perms and not Path(mapping.path).is_relative_to("/dev"):
            begin, end = (int(address, 16) for address in mapping.addr.split("-"))
            for at in range(begin, end, _WINDOW_BYTES):
                yield at, min(end, at + _WINDOW_BYTES)


# Touches memory before a load needs it, so that no sample pays for what the machine's memory has to be fetched with.


def touch_free_memory(wanted_bytes: int) -> int:
    """Touch up to `wanted_bytes` of memory that nobody uses, give it back, and return how much it was."""
    size = max(0, min(wanted_bytes, psutil.virtual_memory().free - _SPARED_BYTES))
    pieces = []
    for done in range(0, size, _PIECE_BYTES):
        piece = host_pages(min(_PIECE_BYTES, size - done))
        number = advise_memory(buffer_address(piece), len(piece), MADV_POPULATE_WRITE)
        if number in (errno.EINVAL, errno.ENOSYS):  # a kernel too old for it
            for offset in range(0, len(piece), mmap.PAGESIZE):
                piece[offset] = 0
        elif number:
            raise MemoryError(f"memory cannot be touched: {errno.errorcode.get(number)}")
        pieces.append(piece)
    for piece in pieces:
        piece.close()
    return size


# Host memory in large pages: what is read into directly, and what is to hold weights, is best in few pieces.


def host_pages(size: int) -> mmap.mmap:
    """Return zeroed private memory of at least `size` bytes that begins on a page, in large pages where there are."""
    length = max(mmap.PAGESIZE, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            return memory
    return memory
