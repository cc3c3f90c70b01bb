"""The device's side of the rate `staged`: what is in slots of pinned host memory goes to the GPU on a stream.

It is done as the engine `streamed` does it: the slots are registered with the driver, all threads queue their copies on
one stream beside the default one, and whoever wants a slot again waits for that slot's copy alone, asleep.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

from ladezeit.system.limits import near_cpus


class Transfer(Protocol):
    """Copies out of numbered slots; may be used by any thread, a slot by one at a time."""

    def copy_slot(self, slot: int, size: int) -> None:
        """Begin to copy the first `size` bytes of a slot to the device."""
        ...

    def wait_slot(self, slot: int) -> None:
        """Return when the copy that was begun from the slot is done; at once where there was none."""
        ...


@contextmanager
def to_cuda(device: str, memory: mmap.mmap, slot_bytes: int) -> Iterator[Transfer]:
    """Pin `memory` for the block, and keep this thread and those that it starts near the GPU `device` (``cuda:N``).

    Raises:
        RuntimeError: the driver refuses to pin it, or the device has no room for as many bytes.
    """
    import torch

    number = torch.device(device).index or 0
    ours = os.sched_getaffinity(0)
    near = near_cpus(pci_address(number))
    source = torch.frombuffer(memory, dtype=torch.uint8)
    address, size = source.data_ptr(), source.numel()
    cudart: Any = torch.cuda.cudart  # untyped in some releases
    with torch.cuda.device(number), ExitStack() as stack:
        if near:
            with suppress(OSError):  # a sandbox may forbid it
                os.sched_setaffinity(0, near)
                stack.callback(os.sched_setaffinity, 0, ours)
        ctypes.memset(address, 0, size)  # by this thread: pages come from the side of who touches them first
        if int(cudart().cudaHostRegister(address, size, 0)) != 0:
            raise RuntimeError(f"the driver refuses to pin {size // 2**20} MiB of host memory")
        stack.callback(cudart().cudaHostUnregister, address)
        stack.callback(torch.cuda.synchronize)  # after an error too: the device must not read what is not pinned
        yield _CudaTransfer(source, number, slot_bytes)


def pci_address(number: int) -> str | None:
    """Return the address of torch's ``cuda:number`` as the system writes it (``0000:3b:00.0``).

    None where this torch does not tell. Asked of torch, for its numbers are not the driver's.
    """
    import torch

    properties = torch.cuda.get_device_properties(number)
    domain, bus, slot = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    return None if domain is None or bus is None or slot is None else f"{domain:04x}:{bus:02x}:{slot:02x}.0"


class _CudaTransfer:
    def __init__(self, source: Any, number: int, slot_bytes: int) -> None:
        import torch

        stream: Any = torch.cuda.Stream
        event: Any = torch.cuda.Event
        self._stream = stream(number)
        self._source = source.view(-1, slot_bytes)
        self._target = torch.empty_like(self._source, device=f"cuda:{number}")
        self._stream.wait_stream(torch.cuda.current_stream(number))  # which may still use that memory
        self._copied = [event(blocking=True) for _ in range(len(self._source))]

    def copy_slot(self, slot: int, size: int) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self._target[slot, :size].copy_(self._source[slot, :size], non_blocking=True)
            self._copied[slot].record(self._stream)

    def wait_slot(self, slot: int) -> None:
        self._copied[slot].synchronize()
