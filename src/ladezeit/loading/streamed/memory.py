"""Host memory of a shard, and tensors as views of a shard's memory, on whatever device that is."""

import ctypes
import errno
import math
import mmap
import os
from typing import TYPE_CHECKING, Any

import torch

from ladezeit.checkpoint.headers import TensorEntry
from ladezeit.errors import LoadError
from ladezeit.loading.dtypes import torch_dtype
from ladezeit.loading.streamed.files import ShardFile
from ladezeit.loading.streamed.plan import PAGE, Extent, How, ShardPlan
from ladezeit.measure.host_pages import LARGE_PAGE, host_pages

if TYPE_CHECKING:
    from torch import Tensor

_MADV_POPULATE_READ = 22  # since Linux 5.14
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MAP_FIXED = 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


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


def anonymous(size: int) -> "Tensor":
    """Return `size` bytes that begin on a page, whose memory lives as long as a tensor of it does."""
    return torch.frombuffer(host_pages(size), dtype=torch.uint8)


def writable(memory: "Tensor") -> memoryview:
    """Return a host tensor's bytes as a buffer to read into, valid as long as the tensor.

    The tensor begins on a page and has its last page to itself, which direct I/O fills whole: so the buffer is whole
    pages, even where the tensor ends inside one.
    """
    size = -(-memory.numel() // PAGE) * PAGE
    return memoryview((ctypes.c_ubyte * size).from_address(memory.data_ptr())).cast("B")


def mapped(plan: ShardPlan, file: ShardFile) -> "Tensor":
    """Return a private mapping of a shard's span: what is written to it stays in memory and never reaches the file.

    Extents that are not to be mapped have anonymous memory in their place, to be read into.
    """
    try:
        # torch closes the file again; Python's mmap would keep it open as long as the weights live.
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.descriptor}", False, plan.end)
    except RuntimeError as cause:
        raise file.failed(0, f"it cannot be mapped ({cause})") from cause
    for begin, end in _not_mapped(plan):
        _put_anonymous(storage.data_ptr() + begin, -(-(end - begin) // PAGE) * PAGE, file, begin)
    return torch.empty(0, dtype=torch.uint8).set_(storage)[plan.base :]


def _not_mapped(plan: ShardPlan) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for extent in plan.extents:
        if extent.how is How.mapped:
            continue
        if runs and runs[-1][1] == extent.begin:
            runs[-1] = (runs[-1][0], extent.end)
        else:
            runs.append((extent.begin, extent.end))
    return runs


def _put_anonymous(address: int, size: int, file: ShardFile, offset: int) -> None:
    """Put anonymous memory in the place of a part of a mapping; both go when the mapping goes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        cause = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise file.failed(offset, f"no memory to read into ({cause.strerror})") from cause
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_HUGEPAGE)


def touch(extent: Extent, memory: "Tensor", file: ShardFile) -> None:
    """Bring in the pages of a mapped extent, whose bytes are the start of `memory`; raises `LoadError`."""
    size = -(-extent.size // PAGE) * PAGE
    if _libc.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), _MADV_POPULATE_READ) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        reason = f"its mapped pages are gone (error {number}: {errno.errorcode.get(number)})"
        raise file.failed(extent.begin, reason) from OSError(number, os.strerror(number))
    memory[: extent.size : PAGE].max()  # an old kernel: one byte of each page


def let_go(extent: Extent, memory: "Tensor") -> None:
    """Take the pages of a mapped extent, whose bytes are the start of `memory`, out of this process again.

    The file's pages stay in the page cache. Left to the end of a load, unmapping 3 GB took one thread a twentieth of a
    second while the others had nothing to do.
    """
    size = extent.size // PAGE * PAGE  # the next extent begins on a page
    _libc.madvise(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(size), _MADV_DONTNEED)


def populate(memory: "Tensor") -> None:
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
