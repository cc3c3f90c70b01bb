"""The compiled kernel of row and column sums, where this installation has one that is right.

It is built when ladezeit is installed and a C compiler is there; where it is not, numpy's kernels give the same sums in
about twice the time. What was built is tried on words of known sums before it is used: a file left over from another
version must not decide what is proven.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ladezeit.validation.content.sums import ROW_WORDS, multipliers

Words = np.ndarray[Any, np.dtype[np.uint64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: Adds up whole rows of `data`, which may begin anywhere: writes their sums into `rows`, adds to `columns`.
Kernel = Callable[[Bytes, Words, Words], None]

_EXTENSION = "ladezeit.validation.content._sums"


@cache
def native_kernel() -> Kernel | None:
    """Return the compiled kernel, which lets go of the interpreter's lock; None where there is none that is right."""
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None or sys.byteorder != "little":
        return None
    try:
        function = ctypes.CDLL(spec.origin).ladezeit_sums
    except (OSError, AttributeError):  # built for another machine, or of another version
        return None
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, ctypes.c_size_t, ctypes.c_size_t, pointer, pointer, pointer]
    function.restype = None
    factors = multipliers()

    def kernel(data: Bytes, rows: Words, columns: Words) -> None:
        function(data.ctypes.data, len(rows), ROW_WORDS, factors.ctypes.data, rows.ctypes.data, columns.ctypes.data)

    return kernel if _is_right(kernel) else None


def _is_right(kernel: Kernel) -> bool:
    words = np.random.default_rng(0).integers(0, 2**64, size=(7, ROW_WORDS), dtype=np.uint64)
    rows, columns = np.zeros(7, dtype=np.uint64), words[0].copy()
    kernel(words.view(np.uint8).reshape(-1), rows, columns)
    expected = (words * multipliers()).sum(axis=1, dtype=np.uint64)
    return bool((rows == expected).all() and (columns == words.sum(axis=0, dtype=np.uint64) + words[0]).all())
