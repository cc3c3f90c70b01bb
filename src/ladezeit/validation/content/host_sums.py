"""Row and column sums of tensors in host memory, by threads: in the compiled kernel, or in numpy's where that is not.

Both let go of the interpreter's lock. numpy needs two kernels for a chunk: the first brings it from memory into the
second-level cache, the second finds it there, so that memory is read once.
"""

from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING

import numpy as np

from ladezeit.validation.content.native_sums import native_kernel
from ladezeit.validation.content.pieces import flat_pieces, size_bytes
from ladezeit.validation.content.sums import ROW_BYTES, ROW_WORDS, multipliers, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from ladezeit.validation.content.native_sums import Bytes, Words

#: Half of a usual second-level cache, and with its multipliers (8 KiB) and columns (8 KiB) well inside of it.
CHUNK_ROWS = 64
#: What one thread takes at a time: enough that handing it out costs nothing.
TASK_ROWS = 4096


class HostSums:
    """Sums of one tensor of more than one row, made by an executor's threads; `result` waits for them."""

    def __init__(self, tensor: "Tensor", pool: Executor, task_rows: int = TASK_ROWS) -> None:
        self._rows = np.zeros(rows_of(size_bytes(tensor)), dtype=np.uint64)
        self._tasks: list[Future[Words]] = []
        if tensor.is_contiguous():
            (whole,) = flat_pieces(tensor)
            data = whole.numpy()
            for first in range(0, len(self._rows), task_rows):
                part = data[first * ROW_BYTES : (first + task_rows) * ROW_BYTES]
                self._tasks.append(pool.submit(_sum, part, self._rows[first : first + task_rows]))
        else:
            self._tasks.append(pool.submit(_sum_strided, tensor, self._rows))

    def result(self) -> "tuple[Words, ...]":
        """Return what stands for the tensor: see `folded`."""
        columns = np.zeros(ROW_WORDS, dtype=np.uint64)
        for task in self._tasks:
            columns += task.result()
        return folded(self._rows, columns)


def folded(rows: "Words", columns: "Words") -> "tuple[Words, ...]":
    """Return (row sums, column sums), or in place of many row sums (their row sums, their column sums): see `sums`."""
    if len(rows) <= ROW_WORDS:
        return rows, columns
    second = np.zeros(rows_of(rows.nbytes), dtype=np.uint64)
    return second, _sum(np.ascontiguousarray(rows).view(np.uint8), second), columns


def _sum(data: "Bytes", rows: "Words") -> "Words":
    """Write the row sums of `data` into `rows` and return its column sums; the last row is filled up with zeros."""
    columns = np.zeros(ROW_WORDS, dtype=np.uint64)
    sum_rows = native_kernel() or _sum_rows
    whole = len(data) // ROW_BYTES
    sum_rows(data[: whole * ROW_BYTES], rows[:whole], columns)
    if whole * ROW_BYTES < len(data):
        last = np.zeros(ROW_BYTES, dtype=np.uint8)
        last[: len(data) - whole * ROW_BYTES] = data[whole * ROW_BYTES :]
        sum_rows(last, rows[whole:], columns)
    return columns


def _sum_rows(data: "Bytes", rows: "Words", columns: "Words") -> None:
    """Add up whole rows in numpy's kernels, as `Kernel` says."""
    words = data.view("<u8").reshape(len(rows), ROW_WORDS)
    for first in range(0, len(rows), CHUNK_ROWS):
        chunk = words[first : first + CHUNK_ROWS]
        if not chunk.flags.aligned:  # a tensor may begin anywhere in its file; numpy is fast on whole words only
            chunk = chunk.copy()
        np.einsum("rc,c->r", chunk, multipliers(), out=rows[first : first + len(chunk)])
        columns += np.add.reduce(chunk, axis=0)


def _sum_strided(tensor: "Tensor", rows: "Words") -> "Words":
    """Do as `_sum` does on a tensor whose elements do not lie in order, a piece at a time."""
    columns = np.zeros(ROW_WORDS, dtype=np.uint64)
    rest = np.empty(0, dtype=np.uint8)
    done = 0
    for piece in flat_pieces(tensor):
        data = np.concatenate([rest, piece.numpy()])
        whole = len(data) // ROW_BYTES
        columns += _sum(data[: whole * ROW_BYTES], rows[done : done + whole])
        rest, done = data[whole * ROW_BYTES :], done + whole
    return columns + _sum(rest, rows[done:])
