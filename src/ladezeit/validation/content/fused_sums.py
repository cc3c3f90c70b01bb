"""Row and column sums on a GPU by the compiled kernel: one launch for all tensors, one for their many row sums."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.validation.content.device_kernel import BLOCK_ROWS, PART_WORDS
from ladezeit.validation.content.sums import ROW_BYTES, ROW_WORDS, WORD_BYTES, multipliers

if TYPE_CHECKING:
    from torch import Tensor

    from ladezeit.validation.content.device_kernel import DeviceKernel

    Words = np.ndarray[Any, np.dtype[np.uint64]]
    Numbers = np.ndarray[Any, np.dtype[np.int64]]


class FusedSums:
    """Sums of contiguous tensors of more than one row on one device; `results` waits once for all of them.

    All sums lie in one piece of memory, first what goes to the host: the columns of the tensors and of the row sums
    that are themselves summed, the rows of these, the rows of shorter tensors. Then come the row sums that are summed.
    """

    def __init__(self, kernel: "DeviceKernel", tensors: "list[Tensor]") -> None:
        import torch

        device = tensors[0].device
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        sizes = np.array([tensor.numel() * tensor.element_size() for tensor in tensors])
        heights = -(-sizes // ROW_BYTES)
        long, short = np.flatnonzero(heights > ROW_WORDS), np.flatnonzero(heights <= ROW_WORDS)
        long_heights = -(-heights[long] // ROW_WORDS)
        columns, column_words = _in_order(np.full(len(tensors) + len(long), ROW_WORDS))
        columns, long_columns = columns[: len(tensors)], columns[len(tensors) :]
        long_rows, end = _in_order(long_heights, column_words)
        rows = np.zeros_like(heights)
        rows[short], self._kept_words = _in_order(heights[short], end)
        # The kernel reads two words at once, which begin at an even place.
        rows[long], end = _in_order(heights[long] + heights[long] % 2, self._kept_words + self._kept_words % 2)

        self._places = [list(spans) for spans in zip(_spans(rows, heights), _spans(columns), strict=True)]
        for tensor, *spans in zip(long, _spans(long_rows, long_heights), _spans(long_columns), strict=True):
            self._places[tensor][:1] = spans
        # The driver launches in the device that is this thread's current one, once torch has worked there.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._sums = torch.empty(end, dtype=torch.int64, device=device)
            self._sums[:column_words].zero_()
            addresses_of_rows = self._sums.data_ptr() + WORD_BYTES * rows[long]
            self._launch(
                kernel,
                _parts(addresses, sizes, rows, columns),
                _parts(addresses_of_rows, WORD_BYTES * heights[long], long_rows, long_columns),
            )

    def results(self) -> "list[tuple[Words, ...]]":
        """Return what stands for each tensor, in their order: see `sums`."""
        words = self._sums[: self._kept_words].cpu().numpy().view(np.uint64)
        return [tuple(words[begin:end] for begin, end in spans) for spans in self._places]

    def _launch(self, kernel: "DeviceKernel", *tables: "Numbers") -> None:
        """Run the kernel over one table of parts after the other; they go to the device together."""
        import torch

        device = self._sums.device
        there = torch.from_numpy(np.concatenate([multipliers().view(np.int64), *map(np.ravel, tables)])).to(device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        start = ROW_WORDS
        for table in tables:
            if len(table):
                parts = there[start : start + table.size].view(-1, PART_WORDS)
                kernel.launch(
                    parts, int(_blocks(table[-1:, 1])[0] + table[-1, -1]), there[:ROW_WORDS], self._sums, stream
                )
            start += table.size
        self._there = there  # until the kernel has passed


def _parts(addresses: "Numbers", sizes: "Numbers", rows: "Numbers", columns: "Numbers") -> "Numbers":
    """Return the kernel's table of parts."""
    return np.stack([addresses, sizes, rows, columns, _in_order(_blocks(sizes))[0]], axis=1)


def _blocks(sizes: "Numbers") -> "Numbers":
    return -(-sizes // (ROW_BYTES * BLOCK_ROWS))


def _in_order(sizes: "Numbers", start: int = 0) -> "tuple[Numbers, int]":
    """Return where each of `sizes` begins, one after the other from `start` on, and where the last one ends."""
    ends = start + np.cumsum(sizes)
    return ends - sizes, int(ends[-1]) if len(ends) else start


def _spans(begins: "Numbers", sizes: "Numbers | int" = ROW_WORDS) -> list[tuple[int, int]]:
    return list(zip(begins.tolist(), (begins + sizes).tolist(), strict=True))
