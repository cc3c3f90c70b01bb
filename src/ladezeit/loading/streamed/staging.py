"""The way to a device: reader threads fill pinned slots of a ring, and the device copies them out as they fill.

Each thread has two slots: while the device empties one, the thread fills the other, and before it fills one again it
waits for that copy alone. Nothing is shared between threads, so nothing can lock up. The ring is all the pinned memory
there is; nothing is ever copied to the device from a mapping of the file.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ladezeit.errors import LoadError
from ladezeit.loading.streamed.files import ShardFile
from ladezeit.loading.streamed.memory import writable
from ladezeit.loading.streamed.plan import PAGE, Extent
from ladezeit.measure.host_pages import host_pages

if TYPE_CHECKING:
    from torch import Tensor

SLOTS_A_THREAD = 2

#: Pairs of memory on the device and the host memory whose elements it takes, cast where their dtypes differ.
Moves = Iterable[tuple["Tensor", "Tensor"]]


def _driver() -> Any:
    cudart: Any = torch.cuda.cudart
    return cudart()


class Device(Protocol):
    """Where the weights go, and how bytes get there; one object a load."""

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes on the device."""
        ...

    def pin(self, ring: "Tensor") -> int:
        """Make host memory fit for fast copies; return how many bytes of it were pinned."""
        ...

    def copy(self, moves: Moves) -> Callable[[], None]:
        """Begin to copy host memory to the device; return what waits until that memory may be filled again."""
        ...

    def close(self, ring: "Tensor") -> None:
        """Wait for all copies and undo `pin`; called once, after an error too."""
        ...


class HostDevice:
    """Host memory behind the ring: the same way, for machines and tests without a GPU."""

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes of host memory."""
        return torch.empty(size, dtype=torch.uint8)

    def pin(self, ring: "Tensor") -> int:
        """Pin nothing: there is no device to copy for."""
        return 0

    def copy(self, moves: Moves) -> Callable[[], None]:
        """Copy at once."""
        for target, source in moves:
            target.copy_(source)
        return lambda: None

    def close(self, ring: "Tensor") -> None:
        """Nothing to undo."""


class CudaDevice:
    """A CUDA device: copies on a stream of their own, from memory that is registered with the driver."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        stream: Any = torch.cuda.Stream  # untyped in some releases
        self._stream = stream(self.device)
        # Memory that the allocator hands out may still be in use by work queued before.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._pinned = False

    def allocate(self, size: int) -> "Tensor":
        """Return `size` bytes of device memory; raises `LoadError` where there is not so much."""
        try:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as cause:
            free = torch.cuda.mem_get_info(self.device)[0]
            raise LoadError(
                f"{size / 2**30:.2f} GiB do not fit on {self.device}, which has {free / 2**30:.2f} GiB free: end what "
                f"else uses it, or take a smaller model"
            ) from cause
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return memory

    def pin(self, ring: "Tensor") -> int:
        """Register the ring; where the driver refuses, copies go through its own buffer: slower, and reported."""
        runtime = _driver()
        with torch.cuda.device(self.device):
            self._pinned = int(runtime.cudaHostRegister(ring.data_ptr(), ring.numel(), 0)) == 0
        return ring.numel() if self._pinned else 0

    def copy(self, moves: Moves) -> Callable[[], None]:
        """Queue the copies on the loading stream; a cast follows its copy there, in a block that the stream reuses."""
        event: Any = torch.cuda.Event  # untyped in some releases
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            for target, source in moves:
                # Where they differ torch would cast on the CPU, before it copies.
                same = target.dtype == source.dtype
                target.copy_(source if same else source.to(self.device, non_blocking=True), non_blocking=True)
            copied: Any = event(blocking=True)  # a wait that spins takes a processor from a thread that reads
            copied.record(self._stream)
        wait: Callable[[], None] = copied.synchronize
        return wait

    def close(self, ring: "Tensor") -> None:
        """Wait for the stream, then give the ring back: the driver must not read memory that is gone."""
        self._stream.synchronize()
        if self._pinned:
            runtime = _driver()
            with torch.cuda.device(self.device):
                runtime.cudaHostUnregister(ring.data_ptr())
            self._pinned = False


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
        self.pinned_bytes = device.pin(self._memory)

    def close(self) -> None:
        """Wait for all copies and give the memory back."""
        self._device.close(self._memory)

    def reader(
        self,
        number: int,
        file_of: Callable[[Extent], ShardFile],
        moves: Callable[[Extent, "Tensor"], Moves],
    ) -> tuple[Callable[[Extent], None], Callable[[], None]]:
        """Return what brings one extent to the device in thread `number`, and what waits for that thread's last copies.

        `moves` says where the parts of an extent go, whose bytes are the start of a slot.
        """
        first = number * SLOTS_A_THREAD * self._slot_bytes
        slots = [self._memory[first + n * self._slot_bytes :][: self._slot_bytes] for n in range(SLOTS_A_THREAD)]
        views = [writable(slot) for slot in slots]
        waits: list[Callable[[], None]] = [lambda: None] * SLOTS_A_THREAD
        turn = 0

        def read(extent: Extent) -> None:
            nonlocal turn
            waits[turn]()
            file_of(extent).read(extent, views[turn])
            waits[turn] = self._device.copy(moves(extent, slots[turn]))
            turn = (turn + 1) % SLOTS_A_THREAD

        def finish() -> None:
            for wait in waits:
                wait()

        return read, finish


def slot_bytes(ring_bytes: int, threads: int, extent_bytes: int) -> int:
    """Return the size of a slot, in whole pages, so that all slots fit in `ring_bytes`."""
    return max(PAGE, min(extent_bytes, ring_bytes // (threads * SLOTS_A_THREAD)) // PAGE * PAGE)
