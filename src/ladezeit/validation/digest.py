"""The digest of a tensor: equal digests mean equal dtype, shape and bytes; the same on every device.

`checksum` says what is summed and what that finds for certain. A strong hash over dtype, shape and all sums makes 128
bits of it, so that neither a truncated nor a reinterpreted tensor passes. A tensor of one row (8 KiB) or less is hashed
as it is.
"""

import ctypes
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.system.limits import available_cpus
from ladezeit.validation.checksum import ROW_BYTES, ROW_WORDS, flat_chunks, make_multipliers, rows_of, size_bytes
from ladezeit.validation.cuda_kernel import FusedSums, device_kernel

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_DIGEST_BYTES = 16
_MOST_THREADS = 16
#: Tensors on their way at once: their row sums wait for the hash, a thousandth of their size.
_IN_FLIGHT = 256

#: Half of a usual second-level cache, and with its multipliers (8 KiB) and columns (8 KiB) well inside of it.
CHUNK_ROWS = 64
#: What one thread takes at a time: enough that handing it out costs nothing.
TASK_ROWS = 4096

_EXTENSION = "ladezeit.validation._sums"

CHUNK_BYTES = 32 * 2**20


def digest_tensors(tensors: "Mapping[str, Tensor]") -> dict[str, str]:
    """Return the digest (32 hex digits) of each tensor by its name; every tensor is read, where it lies.

    Strided tensors count as their elements in order. Tensors may lie on several devices; none may be on meta.

    Raises:
        ValueError: a tensor has no bytes to read: it is on meta, sparse or of a quantized torch dtype.
    """
    import torch

    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} has no plain bytes: {tensor.device}, {tensor.layout}, {tensor.dtype}")
        by_device.setdefault(tensor.device, {})[name] = tensor
    found: dict[str, str] = {}
    threads = min(available_cpus(), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for device, own in by_device.items():
            found.update(_on_host(own, pool) if device.type == "cpu" else _on_device(own, pool, threads))
    return {name: found[name] for name in tensors}


def digest_tensor(tensor: "Tensor") -> str:
    """Return the digest (32 hex digits) of one tensor; see `digest_tensors`."""
    return digest_tensors({"": tensor})[""]


def summed_by(device: "torch.device") -> str:
    """Return in words what adds up on a device: a compiled kernel, or what gives the same sums in more time."""
    if device.type == "cpu":
        return "a compiled kernel" if native_kernel() is not None else "numpy (nothing was compiled at installation)"
    return "a compiled kernel" if device_kernel(device) is not None else "torch's operations (no kernel was right here)"


def _on_host(tensors: "Mapping[str, Tensor]", pool: ThreadPoolExecutor) -> dict[str, str]:
    found: dict[str, str] = {}
    large = [name for name, tensor in tensors.items() if size_bytes(tensor) > ROW_BYTES]
    for first in range(0, len(large), _IN_FLIGHT):
        under_way = [(name, HostSums(tensors[name], pool)) for name in large[first : first + _IN_FLIGHT]]
        for name, sums in under_way:
            found[name] = _seal(tensors[name], *sums.get_result())
    for name in tensors.keys() - found.keys():
        found[name] = _seal(tensors[name], _raw(tensors[name]))
    return found


def _on_device(tensors: "Mapping[str, Tensor]", pool: ThreadPoolExecutor, threads: int) -> dict[str, str]:
    import torch

    kernel = device_kernel(next(iter(tensors.values())).device)
    fused, others, small = [], [], []
    for name, tensor in tensors.items():
        if size_bytes(tensor) <= ROW_BYTES:
            small.append(name)
        elif kernel is not None and _is_plain(tensor):
            fused.append(name)
        else:
            others.append(name)
    under_way: list[tuple[list[str], FusedSums | DeviceSums]] = []
    if kernel is not None and fused:
        under_way.append((fused, FusedSums(kernel, [tensors[name] for name in fused])))
    if others:
        under_way.append((others, DeviceSums([tensors[name] for name in others])))
    found: dict[str, str] = {}
    if small:  # brought to the host as one tensor: a copy each would wait for the device each time
        parts = [piece for name in small for piece in flat_chunks(tensors[name])]
        data = torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=np.uint8)
        start = 0
        for name in small:
            end = start + size_bytes(tensors[name])
            found[name] = _seal(tensors[name], data[start:end])
            start = end
    for names, sums in under_way:
        made = list(zip(names, sums.get_results(), strict=True))
        step = -(-len(made) // threads)  # a task each would take longer to hand out than to do
        shares = [made[first : first + step] for first in range(0, len(made), step)]
        for sealed in pool.map(lambda share: {name: _seal(tensors[name], *parts) for name, parts in share}, shares):
            found.update(sealed)
    return found


def _is_plain(tensor: "Tensor") -> bool:
    """Say whether a tensor's elements lie in order in one piece of memory, as they are."""
    import torch

    own = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # others may wrap any number of tensors
    return own and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _raw(tensor: "Tensor") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    pieces = [piece.numpy() for piece in flat_chunks(tensor)]
    return pieces[0] if pieces else np.empty(0, dtype=np.uint8)


def _seal(tensor: "Tensor", *parts: "np.ndarray[Any, Any]") -> str:
    sealed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)};".encode(), digest_size=_DIGEST_BYTES)
    for part in parts:
        sealed.update(np.ascontiguousarray(part).view(np.uint8).data)
    return sealed.hexdigest()


# Row and column sums of tensors in host memory, by threads: in the compiled kernel, or in numpy's where that is not.


class HostSums:
    """Sums of one tensor of more than one row, made by an executor's threads; `result` waits for them."""

    def __init__(self, tensor: "Tensor", pool: Executor, task_rows: int = TASK_ROWS) -> None:
        self._rows = np.zeros(rows_of(size_bytes(tensor)), dtype=np.uint64)
        self._tasks: list[Future[Words]] = []
        if tensor.is_contiguous():
            (whole,) = flat_chunks(tensor)
            data = whole.numpy()
            for first in range(0, len(self._rows), task_rows):
                part = data[first * ROW_BYTES : (first + task_rows) * ROW_BYTES]
                self._tasks.append(pool.submit(_sum, part, self._rows[first : first + task_rows]))
        else:
            self._tasks.append(pool.submit(_sum_strided, tensor, self._rows))

    def get_result(self) -> "tuple[Words, ...]":
        """Return what stands for the tensor: see `fold_sums`."""
        columns = np.zeros(ROW_WORDS, dtype=np.uint64)
        for task in self._tasks:
            columns += task.result()
        return fold_sums(self._rows, columns)


def fold_sums(rows: "Words", columns: "Words") -> "tuple[Words, ...]":
    """Return (row sums, column sums), or for many row sums (their row sums, their column sums): see `checksum`."""
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
        np.einsum("rc,c->r", chunk, make_multipliers(), out=rows[first : first + len(chunk)])
        columns += np.add.reduce(chunk, axis=0)


def _sum_strided(tensor: "Tensor", rows: "Words") -> "Words":
    """Do as `_sum` does on a tensor whose elements do not lie in order, a piece at a time."""
    columns = np.zeros(ROW_WORDS, dtype=np.uint64)
    rest = np.empty(0, dtype=np.uint8)
    done = 0
    for piece in flat_chunks(tensor):
        data = np.concatenate([rest, piece.numpy()])
        whole = len(data) // ROW_BYTES
        columns += _sum(data[: whole * ROW_BYTES], rows[done : done + whole])
        rest, done = data[whole * ROW_BYTES :], done + whole
    return columns + _sum(rest, rows[done:])


# The compiled kernel of row and column sums, where this installation has one that is right.


Words = np.ndarray[Any, np.dtype[np.uint64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: Adds up whole rows of `data`, which may begin anywhere: writes their sums into `rows`, adds to `columns`.
Kernel = Callable[[Bytes, Words, Words], None]


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
    factors = make_multipliers()

    def kernel(data: Bytes, rows: Words, columns: Words) -> None:
        function(data.ctypes.data, len(rows), ROW_WORDS, factors.ctypes.data, rows.ctypes.data, columns.ctypes.data)

    return kernel if _is_right(kernel) else None


def _is_right(kernel: Kernel) -> bool:
    words = np.random.default_rng(0).integers(0, 2**64, size=(7, ROW_WORDS), dtype=np.uint64)
    rows, columns = np.zeros(7, dtype=np.uint64), words[0].copy()
    kernel(words.view(np.uint8).reshape(-1), rows, columns)
    expected = (words * make_multipliers()).sum(axis=1, dtype=np.uint64)
    return bool((rows == expected).all() and (columns == words.sum(axis=0, dtype=np.uint64) + words[0]).all())


# Row and column sums of tensors on an accelerator, by torch's integer operations; the host waits once for all.


class DeviceSums:
    """Sums of many tensors of more than one row on one device; `results` waits once for all of them."""

    def __init__(self, tensors: "list[Tensor]", chunk_bytes: int = CHUNK_BYTES) -> None:
        import torch

        self._chunk_rows = max(1, chunk_bytes // ROW_BYTES)
        self._counts = [rows_of(size_bytes(tensor)) for tensor in tensors]
        device = tensors[0].device
        self._multipliers = torch.from_numpy(make_multipliers().view(np.int64).copy()).to(device)
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

    def get_results(self) -> "list[tuple[Words, ...]]":
        """Return what stands for each tensor, in their order: see `fold_sums`."""
        rows = self._rows.cpu().numpy().view(np.uint64)
        columns = self._columns.cpu().numpy().view(np.uint64)
        return [
            fold_sums(rows[start : start + count], columns[number])
            for number, (start, count) in enumerate(zip(self._starts, self._counts, strict=False))
        ]

    def _fits_a_group(self, tensor: "Tensor") -> bool:
        size = size_bytes(tensor)
        return size % ROW_BYTES == 0 and size // ROW_BYTES <= self._chunk_rows // 2 and tensor.is_contiguous()

    def _sum_together(self, numbers: list[int], tensors: "list[Tensor]", rows: int) -> None:
        import torch

        together = torch.stack([next(flat_chunks(tensors[number])) for number in numbers])
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
        for piece in flat_chunks(tensor):
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
