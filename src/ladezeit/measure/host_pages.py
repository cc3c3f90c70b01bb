"""Host memory in large pages: what is read into directly, and what is to hold weights, is best in few pieces.

A direct read into ordinary pages is as many pieces as there are pages, and a disk's driver takes only so many pieces at
once: on a virtual disk the same read took half as long again as into large pages.
"""

import mmap

#: Of x86-64, and of 64-bit ARM with pages of 4 KiB.
LARGE_PAGE = 2 * 2**20


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
