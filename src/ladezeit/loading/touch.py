"""Touches what a load left lazy: a load that only mapped a file is not done.

The pages behind every tensor in host memory are brought in with one `madvise(MADV_POPULATE_READ)` a storage: the
kernel faults them in order, reads ahead as it would for any reader, and nothing is copied. Where the kernel lacks that
(before Linux 5.14) one byte of every page is read instead.
"""

import ctypes
import errno
import mmap
from typing import Any

from ladezeit.loading.parts import held, reach

_MADV_POPULATE_READ = 22
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def touch(model: Any) -> int:
    """Fault in every page of the model's tensors in host memory; return the bytes that were touched.

    Raises:
        OSError: a page could not be read (an I/O error of the file behind it).
    """
    total = 0
    for start, length in _extents(model):
        if not _populate(start, length):
            _read_each_page(start, length)
        total += length
    return total


def _extents(model: Any) -> list[tuple[int, int]]:
    """Return (address, bytes) of the host memory behind the model, merged where tensors lie on neighbouring pages."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + reach(tensor))
        for tensor in held(model)
        if tensor.device.type == "cpu" and tensor.numel() > 0
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start // _PAGE <= -(-merged[-1][1] // _PAGE):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return [(start, end - start) for start, end in merged]


def _populate(start: int, length: int) -> bool:
    first = start - start % _PAGE
    size = -(-(start + length - first) // _PAGE) * _PAGE
    if _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_POPULATE_READ) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOMEM):
        return False  # an old kernel, or a gap between merged tensors
    raise OSError(number, "the weights could not be read from their file")


def _read_each_page(start: int, length: int) -> None:
    view = (ctypes.c_char * length).from_address(start)
    for offset in range(0, length, _PAGE):
        view[offset]
