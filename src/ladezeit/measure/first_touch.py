"""Touches memory before a load needs it, so that no sample pays for what the machine's memory has to be fetched with.

A virtual machine's memory is its host's: what was never used, or was given back, costs several times as much at its
first touch as later. A load that allocates gigabytes meets that by chance; here memory is touched and let go right
before, so that every sample finds it there.
"""

import ctypes
import errno
import mmap

import psutil

from ladezeit.measure.host_pages import host_pages

_MADV_POPULATE_WRITE = 23  # since Linux 5.14
#: How many times what a load takes is to be touched: the kernel does not hand out first what it got back last. After
#: touching just as much, every second load of 3 GB met memory that its host had to fetch: 2.2 s and not 1.3.
TOUCHED_TIMES = 2
_PIECE_BYTES = 256 * 2**20
#: What is left untouched: the page cache is not to be pushed out for this.
_SPARED_BYTES = 512 * 2**20
_libc = ctypes.CDLL(None, use_errno=True)


def touch_free_memory(wanted_bytes: int) -> int:
    """Touch up to `wanted_bytes` of memory that nobody uses, give it back, and return how much it was."""
    size = max(0, min(wanted_bytes, psutil.virtual_memory().free - _SPARED_BYTES))
    pieces = []
    for done in range(0, size, _PIECE_BYTES):
        piece = host_pages(min(_PIECE_BYTES, size - done))
        if not _advise(piece, _MADV_POPULATE_WRITE):
            for offset in range(0, len(piece), mmap.PAGESIZE):
                piece[offset] = 0
        pieces.append(piece)
    for piece in pieces:
        piece.close()
    return size


def _advise(piece: mmap.mmap, advice: int) -> bool:
    """Return whether the kernel took the advice; false where it is too old for it."""
    view = (ctypes.c_char * len(piece)).from_buffer(piece)
    try:
        if _libc.madvise(ctypes.byref(view), ctypes.c_size_t(len(piece)), advice) == 0:
            return True
        number = ctypes.get_errno()
    finally:
        del view
    if number in (errno.EINVAL, errno.ENOSYS):
        return False
    raise MemoryError(f"memory cannot be touched: {errno.errorcode.get(number)}")
