"""Overwrites memory that an engine gave back, as the next user of that memory would.

An allocator hands a freed block to somebody who asks for its size. A tensor that still lies in such a block holds the
right bytes until then, and would be proven a moment before it breaks. So blocks of the sizes that the engine lent are
asked for, filled, and let go; where the system unmapped the memory instead, reading the tensor ends the process, which
no one takes for a proof either.

In host memory the C library is asked itself, and many times: it has older free blocks of the same size to hand out
first, and for the aligned blocks that torch asks for it looks for larger ones. What it keeps for other threads is out
of reach.
"""

import ctypes
from collections.abc import Iterator, Sequence

#: More than this is not overwritten, because it would cost more than the proof. C libraries and torch's CPU allocator
#: unmap larger blocks when they are freed.
MOST_BYTES = 64 * 2**20
#: Blocks of one size that are asked for in host memory.
_ROUNDS = 64
_PATTERN = 0xA5

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


def scribble(sizes_bytes: Sequence[int], device: str, most_bytes: int = MOST_BYTES) -> int:
    """Fill new blocks of the given sizes, one of each size and then more while they last; return the bytes filled."""
    if device == "cpu":
        once = sorted(set(sizes_bytes), reverse=True)
        return _fill_on_host(_within([size for _ in range(_ROUNDS) for size in once], most_bytes))
    return _fill_on_device(_within(_each_once_then_again(sizes_bytes), most_bytes), device)


def _each_once_then_again(sizes_bytes: Sequence[int]) -> list[int]:
    counted: dict[int, int] = {}
    for size in sizes_bytes:
        counted[size] = counted.get(size, 0) + 1
    once = sorted(counted, reverse=True)
    return [*once, *(size for size in once for _ in range(counted[size] - 1))]


def _within(sizes: Sequence[int], most_bytes: int) -> Iterator[int]:
    """Yield the sizes that fit, one after the other, into `most_bytes` together."""
    filled = 0
    for size in sizes:
        if 0 < size <= most_bytes - filled:
            filled += size
            yield size


def _fill_on_host(sizes: Iterator[int]) -> int:
    filled, blocks = 0, []
    for size in sizes:
        block = _libc.malloc(size)
        if block is None:  # memory is full: what cannot be had cannot be reused either
            break
        ctypes.memset(block, _PATTERN, size)
        blocks.append(block)
        filled += size
    for block in blocks:
        _libc.free(block)
    return filled


def _fill_on_device(sizes: Iterator[int], device: str) -> int:
    import torch

    blocks = []
    for size in sizes:
        try:
            blocks.append(torch.full((size,), _PATTERN, dtype=torch.uint8, device=device))
        except RuntimeError:  # the device is full
            break
    return sum(map(len, blocks))
