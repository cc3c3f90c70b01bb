"""The engine `streamed`: plans a load, looks at the page cache, and reads every part in the way that is fastest for it.

What is in the page cache is mapped (host) or copied through a pinned ring (device); what is not is read past the cache,
in large parallel reads. One load may do all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import StreamedLoading
from ladezeit.errors import ConfigError, LoadError
from ladezeit.loading.base import LoadedTensors, LoadRequest
from ladezeit.loading.streamed import memory, readers
from ladezeit.loading.streamed.files import ShardFile
from ladezeit.loading.streamed.plan import PAGE, Extent, How, ShardPlan, make_plan
from ladezeit.loading.streamed.residency import resident_shares
from ladezeit.loading.streamed.staging import CudaDevice, Device, Ring, slot_bytes
from ladezeit.measure.clock import Clock
from ladezeit.measure.limits import available_cpus

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Load:
    """One load under way: what is read, from which files, into which memory."""

    plans: list[ShardPlan]
    files: list[ShardFile]
    threads: int
    told_by: set[str]
    memories: "dict[int, Tensor]" = field(default_factory=dict)
    ring_bytes: int = 0
    pinned_bytes: int = 0

    def extents(self) -> list[Extent]:
        return [extent for plan in self.plans for extent in plan.extents]

    def source(self, extent: Extent) -> "tuple[ShardFile, ShardPlan, Tensor]":
        return self.files[extent.shard], self.plans[extent.shard], self.memories[extent.shard]

    def effective(self) -> dict[str, Any]:
        extents = self.extents()
        refusals = [file.direct_refused for file in self.files if file.direct_refused is not None]
        return {
            "threads": min(self.threads, len(extents)),
            "extents": len(extents),
            "bytes_read_direct": sum(file.read_bytes[How.direct] for file in self.files),
            "bytes_read_buffered": sum(file.read_bytes[How.buffered] for file in self.files),
            "bytes_mapped": sum(extent.size for extent in extents if extent.how is How.mapped),
            "direct_io_refused": bool(refusals),
            "direct_io_refused_reason": refusals[0] if refusals else None,
            "residency_by": ", ".join(sorted(self.told_by)),
            "ring_bytes": self.ring_bytes,
            "pinned_bytes": self.pinned_bytes,
        }


class StreamedEngine:
    """A `TensorEngine` that reads safetensors shards in parallel, by residency.

    Args:
        progress: told bytes done, bytes in all and seconds since the reading began; must return at once.
        device: makes the device behind the pinned ring from torch's name of it; None where tensors are to lie in host
            memory without one.
    """

    def __init__(
        self,
        progress: readers.Progress | None = None,
        device: Callable[[str], Device | None] = lambda name: CudaDevice(name) if name.startswith("cuda") else None,
    ) -> None:
        self._progress = progress
        self._device = device

    def prepare(self, request: LoadRequest) -> None:
        """Check the arguments; raises `ConfigError` where one is out of its range."""
        _arguments(request)

    @contextmanager
    def open(self, request: LoadRequest, clock: Clock) -> Iterator[LoadedTensors]:
        """Bring all tensors to the request's device, in the checkpoint's dtype; they are the caller's to keep.

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
                load = _plan(request.checkpoint, size, threads, device is None, stack)
            with clock.span("load/read"):
                if device is None:
                    self._read_to_host(load)
                else:
                    self._read_to_device(load, device, size)
                for file in load.files:
                    file.check_unchanged()
                tensors: dict[str, Tensor] = {}
                for plan in load.plans:
                    tensors |= memory.tensors_of(plan, load.memories[plan.shard])
        loaded = LoadedTensors(tensors, effective=load.effective())
        del tensors, load  # the caller's references alone keep the weights
        yield loaded

    def _read_to_host(self, load: _Load) -> None:
        for plan, file in zip(load.plans, load.files, strict=True):
            load.memories[plan.shard] = memory.mapped(plan, file) if plan.mapped else memory.anonymous(plan)
        views = {shard: memory.writable(bytes_) for shard, bytes_ in load.memories.items()}

        def read(extent: Extent) -> None:
            file, plan, target = load.source(extent)
            begin = extent.begin - plan.base
            if extent.how is How.mapped:
                memory.touch(extent, target[begin:], file)
            else:
                file.read(extent, views[extent.shard][begin:])

        readers.run(load.extents(), load.threads, lambda number: (read, lambda: None), self._progress)

    def _read_to_device(self, load: _Load, device: Device, size: int) -> None:
        for plan in load.plans:
            load.memories[plan.shard] = device.allocate(plan.end - plan.base)
        ring = Ring(max(1, min(load.threads, len(load.extents()))), size, device)
        try:
            load.ring_bytes, load.pinned_bytes = ring.size, ring.pinned_bytes
            extents = load.extents()
            readers.run(extents, load.threads, lambda number: ring.reader(number, load.source), self._progress)
        finally:
            ring.close()


def _arguments(request: LoadRequest) -> tuple[StreamedLoading, int]:
    """Return the checked arguments and the number of threads."""
    loading = request.loading
    if not isinstance(loading, StreamedLoading):
        raise ConfigError(f"loading.engine=streamed takes the arguments of streamed, not of {type(loading).__name__}")
    if loading.extent_bytes < PAGE or loading.extent_bytes % PAGE:
        raise ConfigError(f"loading.extent_bytes={loading.extent_bytes} is not a positive multiple of {PAGE}")
    threads = loading.threads if loading.threads is not None else _default_threads()
    if threads < 1:
        raise ConfigError(f"loading.threads={threads} is too small: the least is 1")
    if loading.ring_bytes < threads * 2 * PAGE:
        raise ConfigError(f"loading.ring_bytes={loading.ring_bytes} is too small for {threads} threads")
    return loading, threads


def _default_threads() -> int:
    """Enough reads in flight for a disk on few processors, no more than copies need on many."""
    return min(8, max(4, 2 * available_cpus()))


def _plan(checkpoint: Checkpoint, extent_bytes: int, threads: int, on_host: bool, stack: ExitStack) -> _Load:
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

    def ask(shard: int, ranges: Sequence[tuple[int, int]]) -> list[float]:
        shares, teller = resident_shares(files[shard].descriptor, files[shard].path, ranges)
        told_by.add(teller)
        return shares

    plans = make_plan(checkpoint, extent_bytes, ask, mapping=on_host)
    return _Load(plans, files, threads, told_by)
