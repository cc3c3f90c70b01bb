"""Host memory of a shard, and tensors as views of a shard's memory, on whatever device that is."""

import ctypes
import errno
import math
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from ladezeit.checkpoint.dtypes import torch_dtype
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.errors import CheckpointError, LoadError
from ladezeit.loading.streamed.plan import PAGE, Extent, ReadMethod, ShardPlan
from ladezeit.system.libc import MADV_POPULATE_READ, MAP_FIXED, advise_memory, map_memory
from ladezeit.system.memory_warmup import LARGE_PAGE, host_pages
from ladezeit.system.residency import ResidencyProbe, resident_ranges

if TYPE_CHECKING:
    from torch import Tensor


#: What the kernel or a file system answers where it cannot read past the page cache (into this memory).
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT, errno.ENOSYS)
#: Fewer than IOV_MAX, which is 1,024 on Linux, because what lies between two parts takes one too.
_MOST_VECTORS = 1000


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """Return torch's dtype of a tensor; raises `LoadError` where this torch has none."""
    dtype = torch_dtype(entry.dtype, packed=True)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"tensor '{entry.name}' is {entry.dtype}, which torch {torch.__version__} does not have")
    return dtype


def shape_of(entry: TensorEntry) -> tuple[int, ...]:
    """Return the shape that torch gives a tensor: of a packed dtype it counts bytes, each of two elements."""
    if entry.dtype == "F4" and entry.shape:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def allocate_anonymous(size: int) -> "Tensor":
    """Return `size` bytes that begin on a page, whose memory lives as long as a tensor of it does."""
    return torch.frombuffer(host_pages(size), dtype=torch.uint8)


def writable_view(memory: "Tensor") -> memoryview:
    """Return a host tensor's bytes as a buffer to read into, valid as long as the tensor.

    The tensor begins on a page and has its last page to itself, which direct I/O fills whole: so the buffer is whole
    pages, even where the tensor ends inside one.
    """
    size = -(-memory.numel() // PAGE) * PAGE
    return memoryview((ctypes.c_ubyte * size).from_address(memory.data_ptr())).cast("B")


# One shard, open to be read in parallel: buffered, or past the page cache where the file system lets us.


class ShardFile:
    """A shard from its opening to its closing, and the check that it stayed the same meanwhile.

    `direct_refused` is None, or why direct I/O was tried and not had; the counts are in bytes.

    Raises:
        CheckpointError: it cannot be opened, or does not have `file_bytes` bytes (any more); None leaves that open.
    """

    def __init__(self, path: Path, file_bytes: int | None) -> None:
        self.path = path
        self.direct_refused: str | None = None
        self.read_bytes = {ReadMethod.buffered: 0, ReadMethod.direct: 0}
        #: Who said what of it is in the page cache; None before anybody was asked.
        self.residency_by: str | None = None
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._probe: ResidencyProbe | None = None
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as cause:
            raise CheckpointError(f"{path} cannot be opened: {cause.strerror}. Fetch the checkpoint again") from cause
        self._status = os.fstat(self.descriptor)
        if file_bytes not in (None, self._status.st_size):
            self.close()
            raise CheckpointError(
                f"{path} has {self._status.st_size} bytes, and had {file_bytes} when its header was read: it was "
                f"changed meanwhile. Let its writer finish, or fetch the checkpoint again"
            )

    @property
    def size(self) -> int:
        """Its length in bytes when it was opened."""
        return self._status.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; may be called twice."""
        for descriptor in (self.descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self.descriptor, self._direct = -1, None

    def resident_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """Return whether each range of bytes is in the page cache, by a few of its pages."""
        found, self.residency_by = resident_ranges(self.descriptor, self.path, ranges)
        return found

    def is_resident(self, begin: int, end: int) -> bool:
        """Return whether a range of bytes is in the page cache; for threads that ask just before they read."""
        with self._lock:
            if self._probe is None:
                self._probe = ResidencyProbe(self.descriptor, self.path)
        found = self._probe.is_resident(begin, end)
        self.residency_by = self._probe.teller
        return found

    def told_by_cachestat(self) -> bool:
        """Say whether one call of cachestat tells what of it is in the page cache."""
        self.is_resident(0, PAGE)
        return self.residency_by == "cachestat"

    def read(self, extent: Extent, memory: memoryview) -> None:
        """Read `extent` to the start of `memory`, which begins on a page and holds whole pages.

        Raises:
            LoadError: the file ends too early, or the disk reports an error; names file and offset.
        """
        how = extent.how
        done = self._read_direct(extent, memory) if how is ReadMethod.direct else 0
        with self._lock:
            self.read_bytes[ReadMethod.direct] += done
            self.read_bytes[ReadMethod.buffered] += extent.size - done
        while done < extent.size:
            done += self._preadv(self.descriptor, [memory[done : extent.size]], extent.begin + done)

    def read_scattered(self, extent: Extent, places: Sequence[tuple[int, memoryview]]) -> None:
        """Read parts of `extent` through the page cache, each to its own memory, in as few calls as the system allows.

        Args:
            extent: whose parts are read.
            places: first byte in the file, and memory of the part's length; in the file's order, without overlap.

        Raises:
            LoadError: as `read`.
        """
        with self._lock:
            self.read_bytes[ReadMethod.buffered] += extent.size
        start = 0
        while start < len(places):
            batch: list[memoryview] = []
            position = places[start][0]
            while start < len(places) and len(batch) < _MOST_VECTORS:
                begin, memory = places[start]
                if begin > position:  # what lies between two parts is read to nowhere
                    batch.append(memoryview(bytearray(begin - position)))
                batch.append(memory)
                position = begin + len(memory)
                start += 1
            self._fill(batch, position - sum(map(len, batch)))

    def _fill(self, memories: list[memoryview], offset: int) -> None:
        while memories:
            count = self._preadv(self.descriptor, memories, offset)
            offset += count
            while memories and count >= len(memories[0]):
                count -= len(memories.pop(0))
            if count:
                memories[0] = memories[0][count:]

    def check_unchanged(self) -> None:
        """Raise `LoadError` where the file was written to since it was opened."""
        now, before = os.fstat(self.descriptor), self._status
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise LoadError(f"{self.path} was changed while it was read. Let its writer finish, then load again")

    def read_error(self, offset: int, reason: str) -> LoadError:
        """Return the error to raise where the bytes at `offset` cannot be had."""
        return LoadError(f"{self.path}: the bytes at offset {offset} cannot be read: {reason}")

    def _read_direct(self, extent: Extent, memory: memoryview) -> int:
        """Return how many bytes were read past the page cache: all, or fewer where that is refused."""
        descriptor, done = self.direct_descriptor(), 0
        whole = -(-extent.size // PAGE) * PAGE  # the file's last block is read whole, its end is cut by the kernel
        # After a read that did not end on a page the next would be misaligned: the rest is left to a buffered one.
        while descriptor is not None and done < extent.size and done % PAGE == 0:
            try:
                done += self._preadv(descriptor, [memory[done:whole]], extent.begin + done)
            except LoadError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in _REFUSALS:
                    raise
                self.direct_refused = f"{cause.strerror} at offset {extent.begin + done}"
                descriptor = None
        return min(done, extent.size)

    def direct_descriptor(self) -> int | None:
        """Return a descriptor that reads past the page cache; None where that was refused."""
        with self._lock:
            if self._direct is None and self.direct_refused is None:
                try:
                    # By the open descriptor, so that a file put in its place meanwhile is not the one that is read.
                    name = f"/proc/self/fd/{self.descriptor}"
                    self._direct = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                except OSError as cause:
                    self.direct_refused = f"{cause.strerror} when it was opened"
            return None if self.direct_refused is not None else self._direct

    def _preadv(self, descriptor: int, memories: list[memoryview], offset: int) -> int:
        try:
            count = os.preadv(descriptor, memories, offset)
        except OSError as cause:
            raise self.read_error(offset, cause.strerror or str(cause)) from cause
        if count == 0:
            raise self.read_error(offset, "the file became shorter")
        return count


def map_shard(plan: ShardPlan, file: ShardFile) -> "Tensor":
    """Return a private mapping of a shard's span: what is written to it stays in memory and never reaches the file.

    Extents that are not to be mapped have anonymous memory in their place, to be read into.
    """
    try:
        # torch closes the file again; Python's mmap would keep it open as long as the weights live.
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.descriptor}", False, plan.end)
    except RuntimeError as cause:
        raise file.read_error(0, f"it cannot be mapped ({cause})") from cause
    for begin, end in _not_mapped(plan):
        _put_anonymous(storage.data_ptr() + begin, -(-(end - begin) // PAGE) * PAGE, file, begin)
    return torch.empty(0, dtype=torch.uint8).set_(storage)[plan.base :]


def _not_mapped(plan: ShardPlan) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for extent in plan.extents:
        if extent.how is ReadMethod.mapped:
            continue
        if runs and runs[-1][1] == extent.begin:
            runs[-1] = (runs[-1][0], extent.end)
        else:
            runs.append((extent.begin, extent.end))
    return runs


def _put_anonymous(address: int, size: int, file: ShardFile, offset: int) -> None:
    """Put anonymous memory in the place of a part of a mapping; both go when the mapping goes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    try:
        map_memory(size, mmap.PROT_READ | mmap.PROT_WRITE, flags, at=address)
    except OSError as cause:
        raise file.read_error(offset, f"no memory to read into ({cause.strerror})") from cause
    advise_memory(address, size, mmap.MADV_HUGEPAGE)


def fault_in_extent(extent: Extent, memory: "Tensor", file: ShardFile) -> None:
    """Bring in the pages of a mapped extent, whose bytes are the start of `memory`; raises `LoadError`."""
    size = -(-extent.size // PAGE) * PAGE
    number = advise_memory(memory.data_ptr(), size, MADV_POPULATE_READ)
    if number == 0:
        return
    if number not in (errno.EINVAL, errno.ENOSYS):
        reason = f"its mapped pages are gone (error {number}: {errno.errorcode.get(number)})"
        raise file.read_error(extent.begin, reason) from OSError(number, os.strerror(number))
    memory[: extent.size : PAGE].max()  # an old kernel: one byte of each page


def release_pages(extent: Extent, memory: "Tensor") -> None:
    """Take the pages of a mapped extent, whose bytes are the start of `memory`, out of this process again.

    The file's pages stay in the page cache. Left to the end of a load, unmapping 3 GB took one thread a twentieth of a
    second while the others had nothing to do.
    """
    size = extent.size // PAGE * PAGE  # the next extent begins on a page
    advise_memory(memory.data_ptr(), size, mmap.MADV_DONTNEED)


def populate_pages(memory: "Tensor") -> None:
    """Have the system find pages for anonymous memory that is to be read into: one byte of each large page is set.

    Where a read itself comes upon memory without pages, the kernel finds them under a lock on the whole process, which
    a thread that only wants a little memory then waits for: building a model beside sixteen readers took up to a second
    and a half instead of a tenth. What a program touches by itself needs no such lock.
    """
    memory[::LARGE_PAGE].zero_()


def tensors_of(plan: ShardPlan, memory: "Tensor") -> "dict[str, Tensor]":
    """Return a shard's tensors as views of its memory; one that is not aligned to its dtype is a copy of its own."""
    found = {}
    for entry in plan.tensors:
        dtype, shape = dtype_of(entry), shape_of(entry)
        if math.prod(shape) == 0:
            found[entry.name] = torch.empty(shape, dtype=dtype, device=memory.device)
            continue
        part = memory[entry.begin - plan.base : entry.end - plan.base]
        if part.data_ptr() % dtype.itemsize:
            part = part.clone()
        found[entry.name] = part.view(dtype).view(shape)
    return found
