"""Overwrites memory that an engine gave back, as the next user of that memory would.

An allocator hands a freed block to the next one who asks for its size. A tensor that still lies in such a block holds
the right bytes until then, and would be proven a moment before it breaks. So blocks of the sizes that the engine lent
are asked for, filled, and let go; where the system unmapped the memory instead, reading the tensor ends the process,
which no one takes for a proof either.
"""

from collections.abc import Sequence

#: More than this is not overwritten, because it would cost more than the proof. C libraries and torch's CPU allocator
#: unmap larger blocks when they are freed.
MOST_BYTES = 64 * 2**20
_PATTERN = 0xA5


def scribble(sizes_bytes: Sequence[int], device: str, most_bytes: int = MOST_BYTES) -> int:
    """Fill new blocks of the given sizes, one of each size and then more while they last; return the bytes filled."""
    import torch

    counted: dict[int, int] = {}
    for size in sizes_bytes:
        counted[size] = counted.get(size, 0) + 1
    once = sorted(counted, reverse=True)
    again = [size for size in once for _ in range(counted[size] - 1)]
    blocks, filled = [], 0
    for size in (*once, *again):
        if 0 < size <= most_bytes - filled:
            try:
                blocks.append(torch.full((size,), _PATTERN, dtype=torch.uint8, device=device))
            except RuntimeError:  # the device is full: what cannot be had cannot be reused either
                break
            filled += size
    return filled
