"""One load under way: what is read, where it goes, and the two ways there, into host memory and to a device."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from ladezeit.errors import LoadError
from ladezeit.loading.base import LoadRequest
from ladezeit.loading.streamed import memory, readers
from ladezeit.loading.streamed.arguments import Readers, StreamedLoading
from ladezeit.loading.streamed.device import SLOTS_A_THREAD, Device, Moves, PinnedRing, slot_bytes
from ladezeit.loading.streamed.host import HostPlace
from ladezeit.loading.streamed.layout import ALIGNED, Layout
from ladezeit.loading.streamed.memory import ShardFile
from ladezeit.loading.streamed.native_readers import NativeReaders, Runtime, is_built
from ladezeit.loading.streamed.plan import PAGE, Extent, ReadMethod, ResidencyQuery, ShardPlan
from ladezeit.loading.streamed.readers import ExtentQueue
from ladezeit.loading.streamed.readiness import ReadTracker
from ladezeit.system.limits import available_cpus

if TYPE_CHECKING:
    from torch import Tensor

#: Enough reads in flight for a disk, on few processors too, for they only wait.
_THREADS = 16
#: To a GPU: so many copy as fast as a link of 16 PCIe lanes of the fifth generation takes it (6.5 GB/s each), with some
#: to spare, and leave processors to the thread that builds the model. See benchmarks/ring_simulation.py.
_THREADS_TO_DEVICE = 12


@dataclass
class Load:
    """What is read, from which files, and where it goes."""

    files: list[ShardFile]
    plans: list[ShardPlan]
    layout: Layout
    read_tracker: ReadTracker
    spans: "dict[int, Tensor]" = field(default_factory=dict)
    arenas: "dict[int, Tensor]" = field(default_factory=dict)

    def view_tensors(self) -> "dict[str, Tensor]":
        """Return all tensors by name, in the memory that was found for them."""
        tensors = self.layout.view_tensors(self.arenas)
        for plan in self.plans:
            if plan.shard not in self.layout.segments:
                tensors |= memory.tensors_of(plan, self.spans[plan.shard])
        return tensors

    def has_misaligned(self) -> bool:
        """Say whether a tensor begins where its dtype cannot, so that it cannot be a view of its shard's memory."""
        return any(
            (self.spans[plan.shard].data_ptr() + entry.begin - plan.base) % memory.dtype_of(entry).itemsize
            for plan in self.plans
            if plan.shard not in self.layout.segments
            for entry in plan.tensors
        )

    def only_computes(self) -> bool:
        """Say whether all is copied or cast from the page cache into host memory, and nothing waits for a disk."""
        on_host = all(arena.device.type == "cpu" for arena in self.arenas.values())
        cached = all(extent.how in (ReadMethod.mapped, ReadMethod.buffered) for extent in self.read_tracker.in_order)
        return bool(self.arenas) and on_host and cached

    def describe_effective(self) -> dict[str, Any]:
        """Return what was done with the bytes; complete when all are read."""
        extents = self.read_tracker.in_order
        refusals = [file.direct_refused for file in self.files if file.direct_refused is not None]
        return {
            "extents": len(extents),
            "bytes_read_direct": sum(file.read_bytes[ReadMethod.direct] for file in self.files),
            "bytes_read_buffered": sum(file.read_bytes[ReadMethod.buffered] for file in self.files),
            "bytes_mapped": sum(extent.size for extent in extents if extent.how is ReadMethod.mapped),
            "pieces_placed": sum(map(len, self.layout.segments.values())),
            "direct_io_refused": bool(refusals),
            "direct_io_refused_reason": refusals[0] if refusals else None,
            "residency_by": ", ".join(sorted({file.residency_by for file in self.files if file.residency_by})),
        }


class Transfer(Protocol):
    """A way of one load's bytes into memory."""

    #: What is read; filled by `begin`.
    queue: ExtentQueue
    #: The most that is looked up or goes through a buffer at once, in bytes.
    extent_bytes: int
    #: Whether the bytes go to host memory and may be mapped there; else each tensor is to be aligned for kernels.
    on_host: bool

    @property
    def query_residency(self) -> ResidencyQuery | None:
        """What tells beforehand which parts are in the page cache; None where each thread asks before it reads."""
        ...

    def run_transfer(self) -> None:
        """Read all that is in the queue; returns when that is done, or early once the queue is stopped."""
        ...

    def begin_load(self, load: Load) -> None:
        """Find memory for `load` and fill the queue; raises `LoadError` where there is not so much."""
        ...

    def describe_effective(self) -> dict[str, Any]:
        """Return what was used for it."""
        ...


class ToHost:
    """Into host memory, where what is in the page cache is mapped if it may stay as it lies."""

    on_host = True

    def __init__(self, files: list[ShardFile], request: LoadRequest, loading: StreamedLoading) -> None:
        self.queue = ExtentQueue()
        self.extent_bytes = loading.extent_bytes
        self._files, self._progress = files, request.progress
        self._asked_threads = loading.threads
        self._threads = 0
        self._place: HostPlace | None = None
        self._tracker: ReadTracker | None = None

    def query_residency(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """See `plan.ResidencyQuery`."""
        return self._files[shard].resident_ranges(ranges)

    def run_transfer(self) -> None:
        """See `Transfer.run_transfer`."""
        if not self.queue.wait():
            return
        place, tracker = self._place, self._tracker
        assert place is not None and tracker is not None
        readers.run_readers(
            self.queue, (place.make_reader(tracker.mark_read) for _ in range(self._threads)), self._progress
        )

    def begin_load(self, load: Load) -> None:
        """See `Transfer.begin_load`."""
        extents = load.read_tracker.in_order
        # Where nothing waits for a disk, each thread that casts has torch's beside it.
        cached = all(extent.how is not ReadMethod.direct for extent in extents)
        threads = self._asked_threads or (available_cpus() if cached else _THREADS)
        self._threads = min(threads, len(extents))
        self._tracker = load.read_tracker
        self._place = HostPlace(load.plans, load.files, load.layout, self.extent_bytes)
        load.spans, load.arenas = self._place.spans, self._place.arenas
        self.queue.put_extents(extents)

    def describe_effective(self) -> dict[str, Any]:
        """See `Transfer.describe_effective`."""
        none = dict.fromkeys(("ring_bytes", "pinned_bytes", "unpinned_after_load", "near_cpus"), 0)
        return {"readers": "python", "threads": self._threads, **none}


class ToDevice(ABC):
    """To a device through a ring, which is pinned while the load is planned."""

    on_host = False
    query_residency: ResidencyQuery | None = None

    def __init__(self, device: Device, files: list[ShardFile], request: LoadRequest, loading: StreamedLoading) -> None:
        self.queue = ExtentQueue()
        self._device, self._files, self._progress = device, files, request.progress
        threads = loading.threads or self._default_threads()
        self.extent_bytes = slot_bytes(loading.ring_bytes, threads, loading.extent_bytes)
        self._threads = max(1, min(threads, -(-sum(file.size for file in files) // self.extent_bytes)))
        self._load: Load | None = None

    def begin_load(self, load: Load) -> None:
        """See `Transfer.begin_load`."""
        for plan in load.plans:
            if plan.shard not in load.layout.segments:
                load.spans[plan.shard] = self._span(plan)
        load.arenas = {arena: self._device.allocate_memory(bytes_) for arena, bytes_ in load.layout.arena_bytes.items()}
        self._load = load
        self.queue.put_extents(load.read_tracker.in_order)

    @abstractmethod
    def run_transfer(self) -> None:
        """See `Transfer.run_transfer`."""

    @abstractmethod
    def describe_effective(self) -> dict[str, Any]:
        """See `Transfer.describe_effective`."""

    def _effective(self, readers: str, pinned_bytes: int) -> dict[str, Any]:
        return {
            "readers": readers,
            "threads": self._threads,
            "ring_bytes": self._threads * SLOTS_A_THREAD * self.extent_bytes,
            "pinned_bytes": pinned_bytes,
            "unpinned_after_load": pinned_bytes,
            "near_cpus": len(self._device.numa_local),
        }

    def _default_threads(self) -> int:
        """Return as many as fill a link; for what is cached, no more than there are processors to copy it."""
        if not any(file.is_resident(0, PAGE) for file in self._files):
            return _THREADS_TO_DEVICE
        return min(_THREADS_TO_DEVICE, len(self._device.numa_local) or available_cpus())

    def _span(self, plan: ShardPlan) -> "Tensor":
        """Return memory for a shard's span, which begins where the shard's tensors are aligned for kernels."""
        size = plan.end - plan.base
        first = min((entry.begin for entry in plan.tensors if entry.begin < entry.end), default=plan.base)
        shift = (plan.base - first) % ALIGNED
        return self._device.allocate_memory(size + ALIGNED)[shift : shift + size]


class NativeTransfer(ToDevice):
    """By threads that know no Python, for bytes that are only copied."""

    def __init__(
        self, device: Device, runtime: Runtime, files: list[ShardFile], request: LoadRequest, loading: StreamedLoading
    ) -> None:
        super().__init__(device, files, request, loading)
        # Only cachestat is asked by these threads: where another has to tell, it does so beforehand.
        if not all(file.told_by_cachestat() for file in files):
            self.query_residency = lambda shard, ranges: files[shard].resident_ranges(ranges)
        self._readers = NativeReaders(runtime, self._threads, self.extent_bytes)

    def run_transfer(self) -> None:
        """See `Transfer.run_transfer`."""
        self._readers.wait_until_read(self.queue, self._progress)

    def describe_effective(self) -> dict[str, Any]:
        """See `Transfer.describe_effective`."""
        return self._effective("native", self._readers.pinned_bytes)

    def begin_load(self, load: Load) -> None:
        """See `Transfer.begin_load`."""
        super().begin_load(load)
        memory = {shard: (load.plans[shard].base, span) for shard, span in load.spans.items()}
        self._readers.submit_reads(load.read_tracker, load.files, load.layout.segments, memory, load.arenas)


class RingTransfer(ToDevice):
    """By threads of Python, for bytes that are cast on the device too. It is the ring's `device.Source`."""

    def __init__(self, device: Device, files: list[ShardFile], request: LoadRequest, loading: StreamedLoading) -> None:
        super().__init__(device, files, request, loading)
        self._ring = PinnedRing(self._threads, self.extent_bytes, device)

    def run_transfer(self) -> None:
        """See `Transfer.run_transfer`."""
        try:
            own = (self._ring.make_reader(number, self) for number in range(self._threads))
            readers.run_readers(self.queue, own, self._progress)
        finally:
            self._ring.close()

    def describe_effective(self) -> dict[str, Any]:
        """See `Transfer.describe_effective`."""
        return self._effective("python", self._ring.pinned_bytes)

    def fill_slot(self, extent: Extent, memory: memoryview) -> None:
        """See `device.Source.fill_slot`."""
        file = self._files[extent.shard]
        if extent.how is ReadMethod.by_residency:
            extent = replace(
                extent, how=ReadMethod.buffered if file.is_resident(extent.begin, extent.end) else ReadMethod.direct
            )
        file.read(extent, memory)

    def plan_moves(self, extent: Extent, slot: "Tensor") -> Moves:
        """See `device.Source.plan_moves`."""
        load = self._load
        assert load is not None
        if extent.shard not in load.layout.segments:
            begin = extent.begin - load.plans[extent.shard].base
            yield load.spans[extent.shard][begin : begin + extent.size], slot[: extent.size]
            return
        for piece in load.layout.of_extent(extent.shard, extent.begin, extent.end):
            yield piece.describe_move(load.arenas[piece.arena], slot, extent.begin)

    def mark_arrived(self, extent: Extent) -> None:
        """See `device.Source.mark_arrived`."""
        assert self._load is not None
        self._load.read_tracker.mark_read(extent)


def transfer_of(
    device: Device | None, files: list[ShardFile], request: LoadRequest, loading: StreamedLoading
) -> Transfer:
    """Return the way for a request: into host memory where there is no `device`.

    Raises:
        LoadError: native readers were asked for and cannot do it.
    """
    if device is None:
        return ToHost(files, request, loading)
    casts = request.weight_mapping is not None and bool(request.weight_mapping.dtypes)
    runtime = device.load_runtime() if is_built() and not casts and loading.readers is not Readers.python else None
    if runtime is not None:
        return NativeTransfer(device, runtime, files, request, loading)
    if loading.readers is Readers.native:
        why = (
            "weights are cast on the device, which they leave to Python's"
            if casts
            else "the CUDA runtime that torch has loaded was not found"
            if is_built()
            else "this installation was built without a C compiler"
        )
        raise LoadError(f"loading.readers=native cannot be had: {why}. Use loading.readers=auto")
    return RingTransfer(device, files, request, loading)
