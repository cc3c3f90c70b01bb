"""The engine `streamed`: plans a load, looks at the page cache, and reads every part in the way that is fastest for it.

What is in the page cache is mapped (host) or copied through a pinned ring (device); what is not is read past the cache,
in large parallel reads. One load may do all of it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.residency import resident_ranges
from ladezeit.config import StreamedLoading
from ladezeit.errors import ConfigError, LoadError
from ladezeit.loading.arrangement import Arrangement
from ladezeit.loading.base import LoadedTensors, LoadRequest, Progress
from ladezeit.loading.streamed import memory, readers
from ladezeit.loading.streamed.arrivals import Arrivals
from ladezeit.loading.streamed.files import ShardFile
from ladezeit.loading.streamed.host import HostPlace
from ladezeit.loading.streamed.placing import ALIGNED, Layout, lay_out
from ladezeit.loading.streamed.plan import PAGE, Extent, How, ShardPlan, make_plan
from ladezeit.loading.streamed.readers import Reading
from ladezeit.loading.streamed.staging import CudaDevice, Device, Moves, Ring, slot_bytes
from ladezeit.measure.clock import Clock
from ladezeit.measure.limits import available_cpus

if TYPE_CHECKING:
    from torch import Tensor


#: Enough reads in flight for a disk, on few processors too, for they only wait; no more than a link to a GPU needs.
_THREADS = 16


@dataclass
class _Load:
    """One load under way: what is read, from which files, and where it goes."""

    plans: list[ShardPlan]
    files: list[ShardFile]
    layout: Layout
    threads: int
    told_by: set[str]
    arrivals: Arrivals
    spans: "dict[int, Tensor]" = field(default_factory=dict)
    arenas: "dict[int, Tensor]" = field(default_factory=dict)
    ring_bytes: int = 0
    pinned_bytes: int = 0
    near_cpus: int = 0

    def moves(self, extent: Extent, slot: "Tensor") -> Moves:
        """Yield where the bytes of an extent go, which are the start of `slot`."""
        if extent.shard not in self.layout.pieces:
            begin = extent.begin - self.plans[extent.shard].base
            yield self.spans[extent.shard][begin : begin + extent.size], slot[: extent.size]
            return
        for piece in self.layout.of_extent(extent.shard, extent.begin, extent.end):
            yield piece.move(self.arenas[piece.arena], slot, extent.begin)

    def tensors(self) -> "dict[str, Tensor]":
        tensors = self.layout.tensors(self.arenas)
        for plan in self.plans:
            if plan.shard not in self.layout.pieces:
                tensors |= memory.tensors_of(plan, self.spans[plan.shard])
        return tensors

    def has_misaligned(self) -> bool:
        """Say whether a tensor begins where its dtype cannot, so that it cannot be a view of its shard's memory."""
        return any(
            (self.spans[plan.shard].data_ptr() + entry.begin - plan.base) % memory.dtype_of(entry).itemsize
            for plan in self.plans
            if plan.shard not in self.layout.pieces
            for entry in plan.tensors
        )

    def only_computes(self) -> bool:
        """Say whether all is copied or cast from the page cache into host memory, and nothing waits for a disk."""
        on_host = all(arena.device.type == "cpu" for arena in self.arenas.values())
        return bool(self.arenas) and on_host and all(extent.how is not How.direct for extent in self.arrivals.in_order)

    def effective(self) -> dict[str, Any]:
        extents = self.arrivals.in_order
        refusals = [file.direct_refused for file in self.files if file.direct_refused is not None]
        return {
            "threads": min(self.threads, len(extents)),
            "extents": len(extents),
            "bytes_read_direct": sum(file.read_bytes[How.direct] for file in self.files),
            "bytes_read_buffered": sum(file.read_bytes[How.buffered] for file in self.files),
            "bytes_mapped": sum(extent.size for extent in extents if extent.how is How.mapped),
            "pieces_placed": sum(map(len, self.layout.pieces.values())),
            "direct_io_refused": bool(refusals),
            "direct_io_refused_reason": refusals[0] if refusals else None,
            "residency_by": ", ".join(sorted(self.told_by)),
            "ring_bytes": self.ring_bytes,
            "pinned_bytes": self.pinned_bytes,
            "near_cpus": self.near_cpus,
        }


class StreamedEngine:
    """A `TensorEngine` that reads safetensors shards in parallel, by residency.

    Args:
        device: makes the device behind the pinned ring from torch's name of it; None where tensors are to lie in host
            memory without one.
    """

    def __init__(
        self,
        device: Callable[[str], Device | None] = lambda name: CudaDevice(name) if name.startswith("cuda") else None,
    ) -> None:
        self._device = device

    def prepare(self, request: LoadRequest) -> None:
        """Check the arguments; raises `ConfigError` where one is out of its range."""
        _arguments(request)

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        """Bring all tensors to the request's device as its arrangement says; they are the caller's to keep.

        They are given out while they are read, so that the model is built meanwhile: the phase ``load/read`` is what
        the load then waits for them, `whole_read_s` in `effective` what the reading took.

        Raises:
            CheckpointError: a shard is not there, or not as long as its header said.
            LoadError: bytes cannot be read, a file changed meanwhile, or the device is too small.
        """
        arguments, threads = _arguments(request)
        with ExitStack() as stack:
            with clock.span("load/plan"):
                device = self._device(request.device)
                size = arguments.extent_bytes
                if device is not None:
                    size = slot_bytes(arguments.ring_bytes, threads, size)
                load = _plan(request, size, threads, device is None, stack)
            with clock.span("load/allocate"):
                if device is None:
                    read = _to_host(load, size, request.progress)
                else:
                    read = _to_device(load, device, size, request.progress)
            reading = Reading(read, load.arrivals.end)
            stack.callback(reading.close)
            if load.has_misaligned():  # copies are made of these, so their bytes have to be there
                with clock.span("load/read"):
                    reading.wait()
            loaded = _under_way(load, reading, clock)
            yield loaded
            loaded.wait()


def _under_way(load: _Load, reading: Reading, clock: Clock) -> LoadedTensors:
    """Return the tensors of a load while it is read."""
    # Who assigns weights meanwhile takes a processor and the interpreter from who casts: a cast of 3 GB took 0.83 s
    # instead of 1.00 where all was waited for first (n = 30, two processors).
    together = load.only_computes()

    def wait() -> None:
        with clock.span("load/read"):
            reading.wait()
            for file in load.files:
                file.check_unchanged()
        loaded.effective |= {**load.effective(), "whole_read_s": round(reading.seconds, 6)}
        # From here on the caller's references alone keep the weights.
        loaded.wait, loaded.wait_for = lambda: None, lambda name: None

    def wait_for(name: str) -> None:
        if load.arrivals.has(name):
            return
        timed = clock.begin_step("load/read")
        try:
            if together:
                reading.wait()
            there = load.arrivals.wait(name)
        finally:
            if timed:
                clock.end_step()
        if not there:
            reading.wait()

    loaded = LoadedTensors(load.tensors(), arranged=True, touched=True, wait=wait, wait_for=wait_for)
    return loaded


def _to_host(load: _Load, size: int, progress: Progress | None) -> Callable[[threading.Event], None]:
    """Find memory for a load into host memory and return what reads it."""
    place = HostPlace(load.plans, load.files, load.layout, size)
    load.spans, load.arenas = place.spans, place.arenas

    def reader(number: int) -> tuple[Callable[[Extent], None], Callable[[], None]]:
        return place.reader(number, load.arrivals.arrived)

    return lambda stop: readers.run(load.arrivals.in_order, load.threads, reader, stop, progress)


def _to_device(load: _Load, device: Device, size: int, progress: Progress | None) -> Callable[[threading.Event], None]:
    """Find memory on a device and return what reads a load into it, through a pinned ring."""
    for plan in load.plans:
        if plan.shard not in load.layout.pieces:
            load.spans[plan.shard] = _span_on(device, plan)
    load.arenas = {arena: device.allocate(bytes_) for arena, bytes_ in load.layout.arena_bytes.items()}

    def read(stop: threading.Event) -> None:
        extents, arrivals = load.arrivals.in_order, load.arrivals
        load.near_cpus = len(device.near)
        ring = Ring(max(1, min(load.threads, len(extents))), size, device)

        def reader(number: int) -> tuple[Callable[[Extent], None], Callable[[], None]]:
            return ring.reader(number, lambda extent: load.files[extent.shard], load.moves, arrivals.arrived)

        try:
            readers.run(extents, load.threads, reader, stop, progress)
        finally:
            load.ring_bytes, load.pinned_bytes = ring.size, ring.pinned_bytes
            ring.close()

    return read


def _span_on(device: Device, plan: ShardPlan) -> "Tensor":
    """Return a device's memory for a shard's span, which begins where the shard's tensors are aligned for kernels."""
    size = plan.end - plan.base
    first = min((entry.begin for entry in plan.tensors if entry.begin < entry.end), default=plan.base)
    shift = (plan.base - first) % ALIGNED
    return device.allocate(size + ALIGNED)[shift : shift + size]


def _arguments(request: LoadRequest) -> tuple[StreamedLoading, int]:
    """Return the checked arguments and the number of threads."""
    loading = request.loading
    if not isinstance(loading, StreamedLoading):
        raise ConfigError(f"loading.engine=streamed takes the arguments of streamed, not of {type(loading).__name__}")
    if loading.extent_bytes < PAGE or loading.extent_bytes % PAGE:
        raise ConfigError(f"loading.extent_bytes={loading.extent_bytes} is not a positive multiple of {PAGE}")
    threads = loading.threads if loading.threads is not None else _THREADS
    if threads < 1:
        raise ConfigError(f"loading.threads={threads} is too small: the least is 1")
    if loading.ring_bytes < threads * 2 * PAGE:
        raise ConfigError(f"loading.ring_bytes={loading.ring_bytes} is too small for {threads} threads")
    return loading, threads


def _plan(request: LoadRequest, extent_bytes: int, threads: int, on_host: bool, stack: ExitStack) -> _Load:
    checkpoint = request.checkpoint
    if checkpoint.file_format != "safetensors":
        raise LoadError(f"{checkpoint.folder} is {checkpoint.file_format}: only safetensors can be streamed")
    for entry in checkpoint.tensors:
        memory.dtype_of(entry)
    lengths: list[int | None] = [None] * len(checkpoint.shards)
    for entry in checkpoint.tensors:  # a header was only accepted where its tensors reach the end of the file
        lengths[entry.shard] = max(lengths[entry.shard] or 0, entry.end)
    files = [
        stack.enter_context(ShardFile(path, length)) for path, length in zip(checkpoint.shards, lengths, strict=True)
    ]
    told_by: set[str] = set()

    def ask(shard: int, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        in_memory, teller = resident_ranges(files[shard].descriptor, files[shard].path, ranges)
        told_by.add(teller)
        return in_memory

    arrangement = request.arrangement or Arrangement()
    layout = lay_out(checkpoint, arrangement, for_kernels=not on_host)

    def maps(shard: int) -> bool:  # pieces that are not cast are read to their places at once: one copy, no page faults
        return on_host and (shard not in layout.pieces or layout.casts(shard))

    def stays(shard: int) -> bool:
        return on_host and shard not in layout.pieces

    loading = request.loading
    assert isinstance(loading, StreamedLoading)
    plans = make_plan(checkpoint, extent_bytes, ask, maps=maps, stays=stays, reading=loading.reading)
    extents = [extent for plan in plans for extent in plan.extents]
    if loading.threads is None and all(extent.how is not How.direct for extent in extents):
        # Nothing waits for a disk, and on the host each thread that casts has torch's beside it.
        threads = available_cpus() if on_host else min(_THREADS, available_cpus())
    arrivals = Arrivals(extents, checkpoint.tensors, arrangement)
    return _Load(plans, files, layout, threads, told_by, arrivals)
