"""The way to a device: reader threads fill pinned slots of a ring, and the device copies them out as they fill.

Each thread has two slots and a stream of its own: while the device empties one slot, the thread fills the other, and
before it fills one again it waits for that copy alone. Nothing is shared between threads, so nothing can lock up. The
ring is all the pinned memory there is; nothing is ever copied to the device from a mapping of the file.

A thread pins its own slots, each when it is first needed: pinning 256 MiB takes as long as a device needs for
gigabytes, and so the first threads copy while the last slots are pinned, and the first slots are pinned while the
load is planned. What was pinned is given back behind the load, in a thread that the next load, or the end of the
process, waits for.
"""

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ladezeit.errors import OutOfMemoryError
from ladezeit.loading.streamed.memory import populate_pages, writable_view
from ladezeit.loading.streamed.native_readers import Runtime, cuda_functions
from ladezeit.loading.streamed.plan import PAGE, Extent
from ladezeit.loading.streamed.readers import in_background
from ladezeit.system.limits import near_cpus
from ladezeit.system.memory_warmup import host_pages
from ladezeit.system.staged_transfer import pci_address

if TYPE_CHECKING:
    from torch import Tensor

SLOTS_A_THREAD = 2

#: Pairs of memory on the device and the host memory whose elements it takes, cast where their dtypes differ.
Moves = Iterable[tuple["Tensor", "Tensor"]]


class CopyStream(Protocol):
    """One thread's way to a device; used by that thread alone."""

    #: How much of its memory was pinned so far.
    pinned_bytes: int

    def slot_memory(self, slot: "Tensor") -> "Tensor":
        """Return the memory to fill in place of `slot`, pinned as far as the device can; called once for each slot."""
        ...

    def copy_slot(self, slot: int, moves: Moves) -> None:
        """Begin to copy what lies in a slot."""
        ...

    def wait_slot(self, slot: int) -> None:
        """Return when all copies that were begun from the slot are done."""
        ...


class Device(Protocol):
    """Where the weights go, and how bytes get there; one object a load."""

    #: Processors on the device's side of the machine; empty where that is not known, or all are.
    numa_local: frozenset[int]

    def allocate_memory(self, size: int) -> "Tensor":
        """Return `size` bytes on the device."""
        ...

    def load_runtime(self) -> Runtime | None:
        """Return the functions by which threads that know no Python copy to it; None where there are none."""
        ...

    def make_stream(self) -> CopyStream:
        """Return the calling thread's copy stream."""
        ...

    def synchronize(self) -> None:
        """Wait for all copies; called once, after an error too."""
        ...

    def unpin_memory(self) -> None:
        """Free the memory of all copy streams; called once, after `synchronize`, from any thread."""
        ...


class HostDevice:
    """Host memory behind the ring: the same way, for machines and tests without a GPU."""

    pinned_bytes = 0
    numa_local: frozenset[int] = frozenset()

    def allocate_memory(self, size: int) -> "Tensor":
        """Return `size` bytes of host memory."""
        return torch.empty(size, dtype=torch.uint8)

    def load_runtime(self) -> Runtime | None:
        """Return nothing: Python copies as well."""
        return None

    def make_stream(self) -> CopyStream:
        """Return itself: nothing differs between threads."""
        return self

    def slot_memory(self, slot: "Tensor") -> "Tensor":
        """Pin nothing: there is no device to copy for."""
        return slot

    def copy_slot(self, slot: int, moves: Moves) -> None:
        """Copy at once."""
        for target, source in moves:
            target.copy_(source)

    def wait_slot(self, slot: int) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def unpin_memory(self) -> None:
        """Nothing to undo."""


class CudaDevice:
    """A CUDA device: copies on a stream of their own, from memory that is registered with the driver."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda", torch.device(name).index or 0)
        stream: Any = torch.cuda.Stream  # untyped in some releases
        self._stream = stream(self.device)
        # Memory that the allocator hands out may still be in use by work queued before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self.numa_local = near_cpus(pci_address(self.device.index))
        self._registered: list[Tensor] = []
        self._registers = True
        self._lock = threading.Lock()

    def allocate_memory(self, size: int) -> "Tensor":
        """Return `size` bytes of device memory; raises `OutOfMemoryError` where there is not so much."""
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as cause:
            raise _does_not_fit(size, self.device) from cause
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def load_runtime(self) -> Runtime | None:
        """Return the runtime that torch has loaded; None where it is not found."""
        functions = cuda_functions()
        if functions is None:
            return None
        return Runtime(functions, self.device.index, self._stream.cuda_stream, self.numa_local, _described)

    def make_stream(self) -> CopyStream:
        """Make the calling thread one that works for the device, near it."""
        if self.numa_local:
            with suppress(OSError):  # a sandbox may forbid it, and loads without it
                # Of this thread; its memory comes from where it first touches it.
                os.sched_setaffinity(0, self.numa_local)
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self._stream)
        return CudaCopyStream(self)

    def pin_slot(self, slot: "Tensor") -> "Tensor | None":
        """Return `slot` pinned, or other pinned memory where the driver refuses that; None where it gives none."""
        if self._registers:
            populate_pages(slot)  # the driver takes several times as long to find pages as to pin them
            if int(_driver().cudaHostRegister(slot.data_ptr(), slot.numel(), 0)) == 0:
                with self._lock:
                    self._registered.append(slot)
                return slot
            self._registers = False
            self._forget_refusal()
        try:
            # Where memory cannot be registered (some sandboxes and kernels), the driver may still have its own to give.
            memory = torch.empty(slot.numel() + PAGE, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            self._forget_refusal()
            return None
        return memory[-memory.data_ptr() % PAGE :][: slot.numel()]

    def synchronize(self) -> None:
        """Wait for the stream: the driver must not read what is gone."""
        self._stream.synchronize()

    def unpin_memory(self) -> None:
        """Have the driver forget the memory."""
        with torch.cuda.device(self.device):
            while self._registered:
                _driver().cudaHostUnregister(self._registered.pop().data_ptr())

    def _forget_refusal(self) -> None:
        """Have torch see the error that the runtime keeps, or it takes it for that of this thread's next kernel."""
        with suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(1)


class CudaCopyStream:
    """A thread's way to a CUDA device: its CUDA stream is that thread's current one.

    Where nothing can be pinned, copies go through the driver's own buffer: slower, and reported.
    """

    def __init__(self, device: CudaDevice) -> None:
        self.pinned_bytes = 0
        self._device = device
        event: Any = torch.cuda.Event  # untyped in some releases
        # A wait that spins takes a processor from a thread that reads.
        self._copied = [event(blocking=True) for _ in range(SLOTS_A_THREAD)]
        self._slot_bytes = 0
        self._uncast: Tensor | None = None

    def slot_memory(self, slot: "Tensor") -> "Tensor":
        """See `CopyStream.slot_memory`."""
        self._slot_bytes = slot.numel()
        pinned = self._device.pin_slot(slot)
        self.pinned_bytes += 0 if pinned is None else slot.numel()
        return slot if pinned is None else pinned

    def copy_slot(self, slot: int, moves: Moves) -> None:
        """Queue the copies on the loading stream; where elements are cast, that follows there."""
        for target, source in moves:
            same = target.dtype == source.dtype
            target.copy_(source if same else self._on_device(source), non_blocking=True)
        self._copied[slot].record()

    def wait_slot(self, slot: int) -> None:
        """Return when the device has passed the copies; at once where there were none."""
        self._copied[slot].synchronize()

    def _on_device(self, source: "Tensor") -> "Tensor":
        """Return the elements on the device before they are cast: releases of torch differ in where they would be.

        They lie in scratch memory of this object; the stream has cast what was there before it copies the next.
        """
        if self._uncast is None:
            self._uncast = self._device.allocate_memory(self._slot_bytes)
        bytes_ = self._uncast[: source.nbytes]
        bytes_.copy_(source.view(torch.uint8), non_blocking=True)
        return bytes_.view(source.dtype)


class PinnedRing:
    """Slots of host memory, two a thread.

    Args:
        threads: how many threads fill slots.
        slot_bytes: of one slot, a multiple of a page.
        device: where the slots are emptied to.
    """

    def __init__(self, threads: int, slot_bytes: int, device: Device) -> None:
        in_background.join()  # two rings would be twice the pinned memory that was asked for
        self.size = threads * SLOTS_A_THREAD * slot_bytes
        self._slot_bytes = slot_bytes
        self._device = device
        self._memory = torch.frombuffer(host_pages(self.size), dtype=torch.uint8)
        self._streams: list[CopyStream] = []

    @property
    def pinned_bytes(self) -> int:
        """How much of it has been pinned so far."""
        return sum(stream.pinned_bytes for stream in self._streams)

    def close(self) -> None:
        """Wait for all copies, and begin to give the memory back."""
        self._device.synchronize()
        in_background.run_thread(self._device.unpin_memory)

    def make_reader(self, number: int, source: "Source") -> "RingReader":
        """Return what brings extents to the device in thread `number`."""
        size = SLOTS_A_THREAD * self._slot_bytes
        own = self._memory[number * size : (number + 1) * size]
        return RingReader(own, self._slot_bytes, self._device, self._streams, source)


class Source(Protocol):
    """Where a ring's bytes come from and go to."""

    def fill_slot(self, extent: Extent, memory: memoryview) -> None:
        """Read an extent to the start of `memory`."""
        ...

    def plan_moves(self, extent: Extent, slot: "Tensor") -> Moves:
        """Return where the parts of an extent go, whose bytes are the start of `slot`."""
        ...

    def mark_arrived(self, extent: Extent) -> None:
        """Take note that an extent is on the device, which is found out when its slot is wanted again."""
        ...


class RingReader:
    """Brings extents to a device, in one thread. See `readers.Reader`."""

    def __init__(
        self, memory: "Tensor", slot_bytes: int, device: Device, streams: "list[CopyStream]", source: "Source"
    ) -> None:
        self._own = [memory[n * slot_bytes :][:slot_bytes] for n in range(SLOTS_A_THREAD)]
        self._slots: dict[int, tuple[Tensor, memoryview]] = {}
        self._under_way: list[Extent | None] = [None] * SLOTS_A_THREAD
        self._device, self._streams, self._source = device, streams, source
        self._turn = 0
        self._stream: CopyStream | None = None

    def begin_reading(self) -> None:
        """Open the copy stream and pin its first slot."""
        self._stream = self._device.make_stream()
        self._streams.append(self._stream)
        self._slot(self._stream, 0)

    def read_extent(self, extent: Extent) -> None:
        """Fill a slot and have the device copy it."""
        assert self._stream is not None
        turn = self._turn
        self._empty(turn)
        slot, view = self._slot(self._stream, turn)
        self._source.fill_slot(extent, view)
        self._stream.copy_slot(turn, self._source.plan_moves(extent, slot))
        self._under_way[turn] = extent
        self._turn = (turn + 1) % SLOTS_A_THREAD

    def finish_reading(self) -> None:
        """Wait for the last copies."""
        for slot in (self._turn, (self._turn + 1) % SLOTS_A_THREAD):  # the older one first
            self._empty(slot)

    def _slot(self, stream: CopyStream, number: int) -> "tuple[Tensor, memoryview]":
        if number not in self._slots:
            memory = stream.slot_memory(self._own[number])
            self._slots[number] = memory, writable_view(memory)
        return self._slots[number]

    def _empty(self, slot: int) -> None:
        extent, self._under_way[slot] = self._under_way[slot], None
        if self._stream is not None and extent is not None:
            self._stream.wait_slot(slot)
            self._source.mark_arrived(extent)


def slot_bytes(ring_bytes: int, threads: int, extent_bytes: int) -> int:
    """Return the size of a slot, in whole pages, so that all slots fit in `ring_bytes`."""
    return max(PAGE, min(extent_bytes, ring_bytes // (threads * SLOTS_A_THREAD)) // PAGE * PAGE)


def _does_not_fit(size: int, device: torch.device) -> OutOfMemoryError:
    free = torch.cuda.mem_get_info(device)[0]
    return OutOfMemoryError(
        f"{size / 2**30:.2f} GiB do not fit on {device}, which has {free / 2**30:.2f} GiB free: end what else uses it, "
        f"or take a smaller model"
    )


def _described(code: int) -> str:
    return f"{_driver().cudaGetErrorString(_driver().cudaError(code))} (CUDA error {code})"


def _driver() -> Any:
    cudart: Any = torch.cuda.cudart
    return cudart()
