"""Row and column sums of tensors on an accelerator, by torch's integer operations; the host waits once for all.

For strided tensors, and where there is no compiled kernel (`device_kernel`), which takes about a third of the time.

Temporaries stay below `CHUNK_BYTES`, which is about what a large GPU's second-level cache holds: a chunk is read from
memory once and then from there. Tensors of equal size (a mixture's experts) are summed together, because thousands of
launches would cost more than their bytes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.validation.content.host_sums import folded
from ladezeit.validation.content.pieces import flat_pieces, size_bytes
from ladezeit.validation.content.sums import ROW_BYTES, ROW_WORDS, multipliers, rows_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Words = np.ndarray[Any, np.dtype[np.uint64]]

CHUNK_BYTES = 32 * 2**20


class DeviceSums:
    """Sums of many tensors of more than one row on one device; `results` waits once for all of them."""

    def __init__(self, tensors: "list[Tensor]", chunk_bytes: int = CHUNK_BYTES) -> None:
        import torch

        self._chunk_rows = max(1, chunk_bytes // ROW_BYTES)
        self._counts = [rows_of(size_bytes(tensor)) for tensor in tensors]
        device = tensors[0].device
        self._multipliers = torch.from_numpy(multipliers().view(np.int64).copy()).to(device)
        self._rows = torch.empty(sum(self._counts), dtype=torch.int64, device=device)
        self._columns = torch.zeros((len(tensors), ROW_WORDS), dtype=torch.int64, device=device)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).tolist()
        groups: dict[int, list[int]] = {}
        for number, tensor in enumerate(tensors):
            if self._fits_a_group(tensor):
                groups.setdefault(self._counts[number], []).append(number)
            else:
                self._sum(number, tensor)
        for rows, numbers in groups.items():
            most = self._chunk_rows // rows
            for first in range(0, len(numbers), most):
                self._sum_together(numbers[first : first + most], tensors, rows)

    def results(self) -> "list[tuple[Words, ...]]":
        """Return what stands for each tensor, in their order: see `folded`."""
        rows = self._rows.cpu().numpy().view(np.uint64)
        columns = self._columns.cpu().numpy().view(np.uint64)
        return [
            folded(rows[start : start + count], columns[number])
            for number, (start, count) in enumerate(zip(self._starts, self._counts, strict=False))
        ]

    def _fits_a_group(self, tensor: "Tensor") -> bool:
        size = size_bytes(tensor)
        return size % ROW_BYTES == 0 and size // ROW_BYTES <= self._chunk_rows // 2 and tensor.is_contiguous()

    def _sum_together(self, numbers: list[int], tensors: "list[Tensor]", rows: int) -> None:
        import torch

        together = torch.stack([next(flat_pieces(tensors[number])) for number in numbers])
        words = together.view(torch.int64).view(len(numbers), rows, ROW_WORDS)
        row_sums, column_sums = (words * self._multipliers).sum(dim=2), words.sum(dim=1)
        at = torch.tensor(numbers, device=words.device)
        self._columns[at] = column_sums
        starts = torch.tensor([self._starts[number] for number in numbers], device=words.device)
        places = starts[:, None] + torch.arange(rows, device=words.device)
        self._rows[places] = row_sums

    def _sum(self, number: int, tensor: "Tensor") -> None:
        import torch

        done, rest = self._starts[number], None
        for piece in flat_pieces(tensor):
            data = piece if rest is None or len(rest) == 0 else torch.cat([rest, piece])
            whole = len(data) // ROW_BYTES
            self._sum_rows(number, _words(data[: whole * ROW_BYTES]), done)
            rest, done = data[whole * ROW_BYTES :], done + whole
        if rest is not None and len(rest) > 0:
            last = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=tensor.device)
            last[: len(rest)] = rest
            self._sum_rows(number, _words(last), done)

    def _sum_rows(self, number: int, words: "Tensor", start: int) -> None:
        for first in range(0, words.shape[0], self._chunk_rows):
            chunk = words[first : first + self._chunk_rows]
            at = start + first
            self._rows[at : at + chunk.shape[0]] = (chunk * self._multipliers).sum(dim=1)
            self._columns[number] += chunk.sum(dim=0)


def _words(data: "torch.Tensor") -> "torch.Tensor":
    import torch

    if data.storage_offset() % 8 or data.data_ptr() % 8:  # a view of larger elements must begin at one
        data = data.clone()
    return data.view(torch.int64).view(-1, ROW_WORDS)
