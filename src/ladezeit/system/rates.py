"""How fast this machine moves bytes: from storage, out of the page cache, through a mapping, in memory, to a GPU.

Each function makes several tries, because a limit is what the machine can do at its best. Files are never written, and
pages that are not in the page cache are never brought into it.
"""

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ladezeit.system.libc import MADV_POPULATE_READ, advise_memory, buffer_address, map_memory, unmap_memory
from ladezeit.system.memory_warmup import host_pages
from ladezeit.system.staged_transfer import Transfer

SPAN_BYTES = 8 * 2**20
#: Numbers of threads to try; more than 16 readers gained nothing on any disk or memory that was measured.
THREADS = (4, 8, 16)
COPY_BYTES = 256 * 2**20
_STORAGE_BYTES = 2 * 10**9
_STORAGE_S = 2.5
_CACHED_BYTES = 2**30
_STAGED_BYTES = 8 * 2**30
_SLOTS_A_THREAD = 2
_TRY_S = 0.3
_REPETITIONS = 3
Item = TypeVar("Item")
#: A piece of an open file: its descriptor, where the piece begins, and its length in bytes.
Span = tuple[int, int, int]
#: Makes ready to copy out of slots of memory, whose size in bytes it is told; see `transfer.to_cuda`.
Device = Callable[[mmap.mmap, int], AbstractContextManager[Transfer]]


@dataclass(frozen=True)
class Try:
    """One attempt: `threads` moved `moved_bytes` in `seconds`."""

    threads: int
    moved_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """The rate in 10⁹ bytes per second."""
        return self.moved_bytes / 1e9 / self.seconds


def measure_storage(descriptors: Sequence[int]) -> list[Try]:
    """Read files that were opened with ``O_DIRECT``, at most 2 GB or 2.5 s in all, a part of them a number of threads.

    Raises:
        OSError: the file system refuses direct reads.
    """
    spans = _spans(descriptors, _STORAGE_BYTES)
    # Each number of threads reads a part of its own: disks and hosts remember what was read just now.
    apart = len(spans) >= len(THREADS) * max(THREADS)
    tries = []
    for number, threads in enumerate(THREADS):
        part = spans[number * len(spans) // len(THREADS) : (number + 1) * len(spans) // len(THREADS)]
        tries.append(_read(part if apart else spans, threads, _STORAGE_S / len(THREADS)))
    return tries


def measure_page_cache(descriptors: Sequence[int], cpus: int) -> list[Try]:
    """Copy the first GiB of files that are wholly in the page cache into one buffer a thread."""
    spans = _spans(descriptors, _CACHED_BYTES)
    return [_read(spans, threads, _TRY_S) for threads in _counts(cpus) for _ in range(_REPETITIONS)]


def measure_mapping(descriptors: Sequence[int], cpus: int) -> list[Try]:
    """Map the first GiB of files that are wholly in the page cache and bring in their pages.

    Raises:
        OSError: a file cannot be mapped, or the kernel is older than 5.14.
    """
    spans = _spans(descriptors, _CACHED_BYTES)
    tries = []
    for threads in sorted({1, *_counts(cpus)}):
        for _ in range(_REPETITIONS):
            with ExitStack() as mapped:
                areas = [(mapped.enter_context(_mapped(span)), span[2]) for span in spans]
                tries.append(_drive(areas, lambda area, thread: _populate(*area), threads, _TRY_S))
    return tries


def measure_memory(cpus: int) -> list[Try]:
    """Copy 256 MiB from memory to memory; what counts is the bytes copied, each of which is read and written."""
    with mmap.mmap(-1, COPY_BYTES) as source, mmap.mmap(-1, COPY_BYTES) as target:
        from_address, to_address = _touched(source), _touched(target)

        def copy(span: tuple[int, int], thread: int) -> int:
            start, length = span
            ctypes.memmove(to_address + start, from_address + start, length)
            return length

        tries = []
        for threads in _counts(cpus):
            share = -(-COPY_BYTES // threads)
            parts = [(start, min(share, COPY_BYTES - start)) for start in range(0, COPY_BYTES, share)]
            tries += [_drive(parts, copy, threads, _TRY_S) for _ in range(_REPETITIONS)]
    return tries


def measure_host_to_device(device: str, pinned: bool) -> list[Try]:
    """Copy 256 MiB to the GPU `device` (``cuda:N``), from page-locked memory or from ordinary memory."""
    import torch

    torch.cuda.set_device(device)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source)
    tries = []
    for _ in range(2 * _REPETITIONS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=pinned)
        torch.cuda.synchronize()
        tries.append(Try(1, COPY_BYTES, time.perf_counter() - started))
    return tries


def measure_staged(descriptors: Sequence[int], cpus: int, device: Device) -> list[Try]:
    """Copy the first GiB of files that are wholly in the page cache to a device, again and again, through pinned slots.

    Each thread fills one of its two slots while the device empties the other: copy and transfer go on at the same time
    and share the memory bus, as in a load.

    Args:
        descriptors: the files.
        cpus: how many processors there are.
        device: pins the memory that it is given, whose slots are of `SPAN_BYTES`, for the time of a block.
    """
    spans = _spans(descriptors, _CACHED_BYTES)
    # Filling the first slots and emptying the last ones goes without the other half: there must be many in between.
    spans *= -(-_STAGED_BYTES // sum(length for _, _, length in spans))
    slots = _SLOTS_A_THREAD * max(_counts(cpus))
    memory = host_pages(slots * SPAN_BYTES)
    with device(memory, SPAN_BYTES) as transfer:
        return [_stage(spans, threads, memory, transfer) for threads in _counts(cpus) for _ in range(_REPETITIONS)]


def _stage(spans: Sequence[Span], threads: int, memory: mmap.mmap, transfer: Transfer) -> Try:
    turns = [0] * threads
    with memoryview(memory) as whole, ExitStack() as stack:
        views = [
            stack.enter_context(whole[slot * SPAN_BYTES : (slot + 1) * SPAN_BYTES])
            for slot in range(threads * _SLOTS_A_THREAD)
        ]

        def move(span: Span, thread: int) -> int:
            slot = thread * _SLOTS_A_THREAD + turns[thread]
            turns[thread] = (turns[thread] + 1) % _SLOTS_A_THREAD
            transfer.wait_slot(slot)
            count = os.preadv(span[0], [views[slot]], span[1])
            transfer.copy_slot(slot, count)
            return count

        def finish(thread: int) -> None:
            for turn in range(_SLOTS_A_THREAD):
                transfer.wait_slot(thread * _SLOTS_A_THREAD + turn)

        return _drive(spans, move, threads, _TRY_S, finish)


def _counts(cpus: int) -> list[int]:
    return sorted({min(threads, cpus) for threads in THREADS})


def _spans(descriptors: Sequence[int], most_bytes: int) -> list[Span]:
    spans: list[Span] = []
    left = most_bytes
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        for start in range(0, min(size, left), SPAN_BYTES):
            spans.append((descriptor, start, min(SPAN_BYTES, size - start)))
        left -= min(size, left)
    return spans


def _read(spans: Sequence[Span], threads: int, limit_s: float) -> Try:
    with ExitStack() as stack:
        buffers = [stack.enter_context(host_pages(SPAN_BYTES)) for _ in range(threads)]
        for buffer in buffers:
            _touched(buffer)

        def read(span: Span, thread: int) -> int:
            # The whole buffer is asked for, past the end of a file too: direct reads want whole blocks.
            return os.preadv(span[0], [buffers[thread]], span[1])

        return _drive(spans, read, threads, limit_s)


def _drive(
    items: Sequence[Item],
    move: Callable[[Item, int], int],
    threads: int,
    limit_s: float,
    finish: Callable[[int], None] = lambda thread: None,
) -> Try:
    """Let `threads` take `items` one after another until none is left or the time is up; each takes one at least.

    `finish` waits, on the clock, for what a thread has begun and not seen the end of.
    """
    threads = min(threads, len(items))
    started: list[float] = []
    ready = threading.Barrier(threads, action=lambda: started.append(time.perf_counter()))
    waiting = iter(items)  # a list's iterator gives each item to one thread only

    def work(thread: int) -> tuple[int, float]:
        ready.wait()
        moved = 0
        for item in waiting:
            moved += move(item, thread)
            if time.perf_counter() - started[0] > limit_s:
                break
        finish(thread)
        return moved, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(work, range(threads)))
    return Try(threads, sum(moved for moved, _ in done), max(end for _, end in done) - started[0])


@contextmanager
def _mapped(span: Span) -> Iterator[int]:
    descriptor, start, length = span
    address = map_memory(length, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor=descriptor, offset=start)
    try:
        yield address
    finally:
        unmap_memory(address, length)


def _populate(address: int, length: int) -> int:
    if number := advise_memory(address, length, MADV_POPULATE_READ):
        raise OSError(number, os.strerror(number))
    return length


def _touched(buffer: mmap.mmap) -> int:
    """Write to every page of `buffer` and return its address; the first touch of memory costs more than a copy."""
    address = buffer_address(buffer)
    ctypes.memset(address, 1, len(buffer))
    return address
