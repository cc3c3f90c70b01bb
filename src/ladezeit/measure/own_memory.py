"""Has the machine bring back what a process already has in memory, after gigabytes were touched beside it.

A virtual machine's host keeps sight of so much of its memory. Where gigabytes were touched a moment ago, it has lost
that of a process's own code and objects, and each page of them costs an exit to the host when it is next used: Python
then ran at half its speed for as long as a load takes. Reading every page once, by way of the kernel, brings them back;
nothing becomes resident that was not.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_PAGE = os.sysconf("SC_PAGESIZE")
_ENTRY_BYTES = 8  # of pagemap, which has one a page
_PRESENT = 63  # the bit of an entry that tells of a page in memory
_CHUNK_BYTES = 2**20
_WINDOW_BYTES = 2**30  # of addresses that are looked up at once: some allocators reserve terabytes


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
