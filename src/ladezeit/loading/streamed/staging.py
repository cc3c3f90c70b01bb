"""The way to a device: reader threads fill pinned slots of a ring, and the device copies them out as they fill.

Each thread has a lane of two slots: while the device empties one, the thread fills the other, and before it fills one
again it waits for that copy alone. Nothing is shared between threads, so nothing can lock up. The ring is all the
pinned memory there is; nothing is ever copied to the device from a mapping of the file.

A thread makes its own lane: pinning 256 MiB takes as long as a device needs for gigabytes, and so the first lanes carry
while the last are pinned.
"""

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ladezeit.errors import LoadError
from ladezeit.loading.streamed.files import ShardFile
from ladezeit.loading.streamed.memory import populate, writable
from ladezeit.loading.streamed.plan import PAGE, Extent
from ladezeit.measure.host_pages import host_pages
from ladezeit.measure.limits import near_cpus

if TYPE_CHECKING:
    from torch import Tensor

SLOTS_A_THREAD = 2

#: Pairs of memory on the device and the host memory whose elements it takes, cast where their dtypes differ.
Moves = Iterable[tuple["Tensor", "Tensor"]]


class Lane(Protocol):
    """One thread's way to a device; used by that thread alone."""

    #: How much of its memory was pinned.
    pinned_bytes: int

    def copy(self, slot: int, moves: Moves) -> None:
        """Begin to copy what lies in a slot."""
        ...

    def wait(self, slot: int) -> None:
        """Return when all copies that were begun from the slot are done."""
        ...


class Device(Protocol):
    """Where the weights go, and how bytes get there; one object a load."""

    #: Processors on the device's side of the machine; empty where that is not known, or all are.
    near: frozenset[int]

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes on the device."""
        ...

    def lane(self, memory: "Tensor") -> Lane:
        """Return the calling thread's lane, whose slots are in `memory`."""
        ...

    def close(self) -> None:
        """Wait for all copies and let go of the lanes' memory; called once, after an error too."""
        ...


class HostDevice:
    """Host memory behind the ring: the same way, for machines and tests without a GPU."""

    pinned_bytes = 0
    near: frozenset[int] = frozenset()

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes of host memory."""
        return torch.empty(size, dtype=torch.uint8)

    def lane(self, memory: "Tensor") -> Lane:
        """Pin nothing: there is no device to copy for."""
        return self

    def copy(self, slot: int, moves: Moves) -> None:
        """Copy at once."""
        for target, source in moves:
            target.copy_(source)

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to undo."""


class CudaDevice:
    """A CUDA device: copies on a stream of their own, from memory that is registered with the driver."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda", torch.device(name).index or 0)
        stream: Any = torch.cuda.Stream  # untyped in some releases
        self._stream = stream(self.device)
        # Memory that the allocator hands out may still be in use by work queued before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self.near = near_cpus(_pci_address(self.device))
        self._pinned: list[Tensor] = []
        self._lock = threading.Lock()

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes of device memory; raises `LoadError` where there is not so much."""
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as cause:
            raise _does_not_fit(size, self.device) from cause
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def lane(self, memory: "Tensor") -> Lane:
        """Make the calling thread one that works for the device, near it, and pin its memory.

        Where the driver refuses to pin, copies go through its own buffer: slower, and reported.
        """
        if self.near:
            with suppress(OSError):  # a sandbox may forbid it, and loads without it
                os.sched_setaffinity(0, self.near)  # of this thread; its memory comes from where it first touches it
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self._stream)
        populate(memory)  # the driver takes several times as long to find pages as to pin them
        pinned = int(_driver().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
        if pinned:
            with self._lock:
                self._pinned.append(memory)
        else:
            self._forget_refusal()
        return CudaLane(self.device, memory.numel() if pinned else 0)

    def close(self) -> None:
        """Wait for the stream, then give the memory back: the driver must not read what is gone."""
        self._stream.synchronize()
        with torch.cuda.device(self.device):
            while self._pinned:
                _driver().cudaHostUnregister(self._pinned.pop().data_ptr())

    def _forget_refusal(self) -> None:
        """Have torch see the error that the runtime keeps, or it takes it for that of this thread's next kernel."""
        with suppress(RuntimeError):
            torch.empty(1, device=self.device).fill_(1)


class CudaLane:
    """A thread's lane to a CUDA device, whose stream is that thread's current one."""

    def __init__(self, device: torch.device, pinned_bytes: int) -> None:
        self.pinned_bytes = pinned_bytes
        self._device = device
        event: Any = torch.cuda.Event  # untyped in some releases
        # A wait that spins takes a processor from a thread that reads.
        self._copied = [event(blocking=True) for _ in range(SLOTS_A_THREAD)]

    def copy(self, slot: int, moves: Moves) -> None:
        """Queue the copies on the loading stream; a cast follows its copy there, in a block that the stream reuses."""
        for target, source in moves:
            target.copy_(source if target.dtype == source.dtype else self._on_device(source), non_blocking=True)
        self._copied[slot].record()

    def wait(self, slot: int) -> None:
        """Return when the device has passed the copies; at once where there were none."""
        self._copied[slot].synchronize()

    def _on_device(self, source: "Tensor") -> "Tensor":
        """Return the elements on the device before they are cast: releases of torch differ in where they would be."""
        try:
            return source.to(self._device, non_blocking=True)
        except torch.cuda.OutOfMemoryError as cause:
            raise _does_not_fit(source.nbytes, self._device) from cause


class Ring:
    """Slots of host memory, two a thread.

    Args:
        threads: how many threads fill slots.
        slot_bytes: of one slot, a multiple of a page.
        device: where the slots are emptied to.
    """

    def __init__(self, threads: int, slot_bytes: int, device: Device) -> None:
        self.size = threads * SLOTS_A_THREAD * slot_bytes
        self._slot_bytes = slot_bytes
        self._device = device
        self._memory = torch.frombuffer(host_pages(self.size), dtype=torch.uint8)
        self._lanes: list[Lane] = []

    @property
    def pinned_bytes(self) -> int:
        """How much of it has been pinned so far."""
        return sum(lane.pinned_bytes for lane in self._lanes)

    def close(self) -> None:
        """Wait for all copies and give the memory back."""
        self._device.close()

    def reader(
        self,
        number: int,
        file_of: Callable[[Extent], ShardFile],
        moves: Callable[[Extent, "Tensor"], Moves],
        arrived: Callable[[Extent], None],
    ) -> tuple[Callable[[Extent], None], Callable[[], None]]:
        """Return what brings one extent to the device in thread `number`, and what waits for that thread's last copies.

        `moves` says where the parts of an extent go, whose bytes are the start of a slot; `arrived` is told of each
        extent that is on the device, which is found out when its slot is wanted again.
        """
        size = SLOTS_A_THREAD * self._slot_bytes
        own = self._memory[number * size : (number + 1) * size]
        slots = [own[n * self._slot_bytes :][: self._slot_bytes] for n in range(SLOTS_A_THREAD)]
        views = [writable(slot) for slot in slots]
        under_way: list[Extent | None] = [None] * SLOTS_A_THREAD
        turn = 0
        lane: Lane | None = None

        def empty(slot: int) -> None:
            extent, under_way[slot] = under_way[slot], None
            if lane is not None and extent is not None:
                lane.wait(slot)
                arrived(extent)

        def read(extent: Extent) -> None:
            nonlocal turn, lane
            if lane is None:
                lane = self._device.lane(own)
                self._lanes.append(lane)
            empty(turn)
            file_of(extent).read(extent, views[turn])
            lane.copy(turn, moves(extent, slots[turn]))
            under_way[turn] = extent
            turn = (turn + 1) % SLOTS_A_THREAD

        def finish() -> None:
            for slot in (turn, (turn + 1) % SLOTS_A_THREAD):  # the older one first
                empty(slot)

        return read, finish


def slot_bytes(ring_bytes: int, threads: int, extent_bytes: int) -> int:
    """Return the size of a slot, in whole pages, so that all slots fit in `ring_bytes`."""
    return max(PAGE, min(extent_bytes, ring_bytes // (threads * SLOTS_A_THREAD)) // PAGE * PAGE)


def _does_not_fit(size: int, device: torch.device) -> LoadError:
    free = torch.cuda.mem_get_info(device)[0]
    return LoadError(
        f"{size / 2**30:.2f} GiB do not fit on {device}, which has {free / 2**30:.2f} GiB free: end what else uses it, "
        f"or take a smaller model"
    )


def _driver() -> Any:
    cudart: Any = torch.cuda.cudart
    return cudart()


def _pci_address(device: torch.device) -> str | None:
    """Return a device's address as the system writes it (``0000:3b:00.0``); None where torch does not tell."""
    properties = torch.cuda.get_device_properties(device)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    return None if domain is None or bus is None or slot is None else f"{domain:04x}:{bus:02x}:{slot:02x}.0"
