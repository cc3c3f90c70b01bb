"""Functions of the C library that Python has no name for: memory mappings, advice, page cache, heap, processes.

Each docstring names the page of the Linux manual that says more.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence

#: Advice of madvise(2) that `mmap` has no name for; both since Linux 5.14.
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
#: Flag of mmap(2): put the mapping at the address, in the place of what is there.
MAP_FIXED = 0x10
#: Options of prctl(2): the signal when the parent dies, and whether orphans below come to this process.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_CACHESTAT = 451  # the same number on every architecture

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def last_error() -> OSError:
    """Return the error of this thread's last call in here: errno(3)."""
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def map_memory(
    size: int, protection: int, flags: int, *, descriptor: int = -1, offset: int = 0, at: int | None = None
) -> int:
    """Map `size` bytes of a file from `offset`, or anonymous memory, and return the address: mmap(2).

    With `MAP_FIXED` in `flags` that is `at`.

    Raises:
        OSError: the kernel refuses.
    """
    address = _libc.mmap(at, size, protection, flags, descriptor, offset)
    if address in (None, ctypes.c_void_p(-1).value):
        raise last_error()
    return int(address)


def unmap_memory(address: int, size: int) -> None:
    """Give a mapping back: munmap(2)."""
    _libc.munmap(address, size)


def advise_memory(address: int, size: int, advice: int) -> int:
    """Advise the kernel about `size` bytes from `address`, which begins a page; return 0 or an errno: madvise(2)."""
    return 0 if _libc.madvise(address, size, advice) == 0 else ctypes.get_errno()


def buffer_address(buffer: mmap.mmap) -> int:
    """Return where a mapping of Python's lies; valid until it is closed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def count_mapped_pages(address: int, ranges: Sequence[tuple[int, int]], window_bytes: int) -> list[int] | None:
    """Return how many pages of each range of a mapping are in memory; None where the kernel does not tell: mincore(2).

    Args:
        address: of the mapping.
        ranges: begins and ends in bytes from `address`; begins are multiples of a page.
        window_bytes: how much is asked about at once (a byte of memory per page); a multiple of a page.
    """
    longest = min(window_bytes, max([0, *(end - begin for begin, end in ranges)]))
    flags = ctypes.create_string_buffer(-(-longest // mmap.PAGESIZE))
    counts = []
    for begin, end in ranges:
        count = 0
        for start in range(begin, end, window_bytes):
            pages = -(-min(window_bytes, end - start) // mmap.PAGESIZE)
            if _libc.mincore(address + start, pages * mmap.PAGESIZE, flags) != 0:
                return None
            count += flags.raw.count(1, 0, pages)
        counts.append(count)
    return counts


def count_cached_pages(descriptor: int, ranges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return how many pages of each range of a file, in bytes, are in the page cache: cachestat(2), since Linux 6.5.

    None where the kernel has no cachestat or does not tell us.
    """
    asked, found = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()  # offset, length; cached, dirty, …
    counts = []
    for begin, end in ranges:
        asked[0], asked[1] = begin, end - begin
        if _libc.syscall(_CACHESTAT, descriptor, ctypes.addressof(asked), ctypes.addressof(found), 0) != 0:
            return None
        counts.append(int(found[0]))
    return counts


def allocate_block(size: int) -> int | None:
    """Return the address of `size` bytes of the heap, None where there are no more: malloc(3)."""
    address = _libc.malloc(size)
    return None if address is None else int(address)


def free_block(address: int) -> None:
    """Give back what `allocate_block` returned: free(3)."""
    _libc.free(address)


def trim_heap() -> None:
    """Give the heap's free memory back to the system: malloc_trim(3), glibc's; other C libraries keep theirs."""
    if trim := getattr(_libc, "malloc_trim", None):
        trim(0)


def control_process(option: int, value: int) -> None:
    """Set an attribute of this process: prctl(2)."""
    _libc.prctl(option, value, 0, 0, 0)
