"""The arithmetic of a digest: what is summed, over which words, with which multipliers.

A tensor's bytes, in the order of its elements, are little-endian 64-bit words, the last row filled up with zeros::

    x[r, c]    row r of ROW_WORDS words (8 KiB), column c
    row sums   R[r] = Σ_c m[c]·x[r, c]  mod 2^64     m: fixed, odd, pseudo-random, all different
    columns    C[c] = Σ_r x[r, c]       mod 2^64

More than ROW_WORDS row sums are themselves summed in this way, and their row and column sums stand for them: of each
tensor a few kilobytes are left to be hashed, which is all that a device sends to the host.

What that finds for certain:

* any change inside one word, so every flipped bit: m[c] is odd, hence invertible mod 2^64, and R[r] changes;
* any change that touches at most one word of each row: each of those row sums changes;
* any change, however large, inside one row: at least one column sum changes;
* so any change of up to three words, and any swap of two elements of up to 8 bytes wherever they lie: it changes a
  column sum, or up to three row sums, of which the same is true.

What is left must change two words or more in each of two rows or more, with column sums that stay. A fault that knows
nothing of m then passes with a probability of about 2^-64 for each row that it changes in a low bit; only where it
changes nothing but the highest bits of words in every row does that fall to 2^-k for k rows (m is odd: the highest bit
is counted without its position in the row). Swapped or shifted rows and blocks change the order of R, which is hashed
in order, or summed with its positions: that changed row sums have the same sums again has a probability of about 2^-64.

Integers wrap the same on every device, so a sum is the same wherever and in whatever pieces it is made.
"""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


ROW_WORDS = 1024
WORD_BYTES = 8
ROW_BYTES = ROW_WORDS * WORD_BYTES

#: Names this arithmetic in files: digests of another name are not comparable.
ARITHMETIC = "rows1024-twice-splitmix64-blake2b"

_SEED = 0x6C6164657A656974
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1

#: A strided tensor is made contiguous in pieces of about this many bytes.
PIECE_BYTES = 16 * 2**20


@cache
def make_multipliers() -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """Return m: ROW_WORDS odd numbers of splitmix64 (Steele, Lea, Flood 2014), read-only."""
    found, state = [], _SEED
    for _ in range(ROW_WORDS):
        state = (state + _GOLDEN) & _MASK
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        found.append((mixed ^ (mixed >> 31)) | 1)
    made = np.array(found, dtype=np.uint64)
    made.setflags(write=False)
    return made


def rows_of(size_bytes: int) -> int:
    """Return how many rows a tensor of `size_bytes` has; the last one may be partly filling."""
    return -(-size_bytes // ROW_BYTES)


# A tensor's bytes in the order of its elements, whatever its dtype and strides, never copied as a whole.


def flat_chunks(tensor: "Tensor", most_bytes: int = PIECE_BYTES) -> Iterator["Tensor"]:
    """Yield one-dimensional uint8 tensors that are the bytes of `tensor`, in the order of its elements.

    A contiguous tensor is one piece and not copied.
    """
    plain = tensor.detach().resolve_conj().resolve_neg()
    size = plain.numel() * plain.element_size()
    if size == 0:
        return
    if plain.is_contiguous() or size <= most_bytes:
        yield _as_bytes(plain.contiguous())
        return
    slab_bytes = size // plain.shape[0]
    if slab_bytes > most_bytes:
        for slab in plain:
            yield from flat_chunks(slab, most_bytes)
        return
    step = max(1, most_bytes // slab_bytes)
    for start in range(0, plain.shape[0], step):
        yield _as_bytes(plain[start : start + step].contiguous())


def _as_bytes(contiguous: "Tensor") -> "Tensor":
    import torch

    return contiguous.reshape(-1).view(torch.uint8)


def size_bytes(tensor: "Tensor") -> int:
    """Return the bytes of all elements of `tensor`, strides and storage aside."""
    return int(tensor.numel() * tensor.element_size())
