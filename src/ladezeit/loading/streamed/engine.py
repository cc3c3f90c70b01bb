"""The engine `streamed`: plans a load, looks at the page cache, and reads every part in the way that is fastest for it.

What is in the page cache is mapped (host) or copied through a pinned ring (device); what is not is read past the cache,
in large parallel reads. One load may do all of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ladezeit.errors import ConfigError, LoadError
from ladezeit.loading.base import LoadedTensors, LoadRequest, WeightMapping
from ladezeit.loading.streamed import memory
from ladezeit.loading.streamed.arguments import StreamedLoading
from ladezeit.loading.streamed.device import SLOTS_A_THREAD, CudaDevice, Device
from ladezeit.loading.streamed.layout import plan_layout
from ladezeit.loading.streamed.memory import ShardFile
from ladezeit.loading.streamed.plan import PAGE, make_plan
from ladezeit.loading.streamed.readers import Reading, quick_switching
from ladezeit.loading.streamed.readiness import ReadTracker
from ladezeit.loading.streamed.transfer import Load, Transfer, transfer_of
from ladezeit.timing.clock import Clock


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

    def prepare(self, request: LoadRequest[StreamedLoading]) -> None:
        """Check the arguments; raises `ConfigError` where one is out of its range."""
        _arguments(request)

    @contextmanager
    def open(self, request: LoadRequest[StreamedLoading], clock: Clock) -> Iterator[LoadedTensors]:
        """Bring all tensors to the request's device as its mapping says; they are the caller's to keep.

        They are given out while they are read, so that the model is built meanwhile: the phase ``load/read`` is what
        the load then waits for them, `whole_read_s` in `effective` what the reading took.

        Raises:
            CheckpointError: a shard is not there, or not as long as its header said.
            LoadError: bytes cannot be read, a file changed meanwhile, or the device is too small.
        """
        loading = _arguments(request)
        with ExitStack() as stack:
            stack.enter_context(quick_switching())
            with clock.span("load/plan"):
                files = _opened(request, stack)
                transfer = transfer_of(self._device(request.device), files, request, loading)
                reading = Reading(transfer.run_transfer, transfer.queue)  # on the way to a device it pins meanwhile
                stack.callback(reading.close)
                load = _plan(request, loading, files, transfer)
            with clock.span("load/allocate"):
                transfer.begin_load(load)
            reading.when_ended(load.read_tracker.mark_ended)
            if load.has_misaligned():  # copies are made of these, so their bytes have to be there
                with clock.span("load/read"):
                    reading.wait()
            loaded = _under_way(load, transfer, reading, clock)
            yield loaded
            loaded.wait()


def _under_way(load: Load, transfer: Transfer, reading: Reading, clock: Clock) -> LoadedTensors:
    """Return the tensors of a load while it is read."""
    # Who assigns weights meanwhile takes a processor and the interpreter from who casts: a cast of 3 GB took 0.83 s
    # instead of 1.00 where all was waited for first (n = 30, two processors).
    together = load.only_computes()

    def wait() -> None:
        with clock.span("load/read"):
            reading.wait()
            for file in load.files:
                file.check_unchanged()
        loaded.effective |= {
            **load.describe_effective(),
            **transfer.describe_effective(),
            "whole_read_s": round(reading.seconds, 6),
        }
        # From here on the caller's references alone keep the weights.
        loaded.wait, loaded.wait_for = lambda: None, lambda name: None

    def wait_for(name: str) -> None:
        if load.read_tracker.is_read(name):
            return
        timed = clock.begin_step("load/read")
        try:
            if together:
                reading.wait()
            there = load.read_tracker.wait_read(name)
        finally:
            if timed:
                clock.end_step()
        if not there:
            reading.wait()

    loaded = LoadedTensors(load.view_tensors(), mapped=True, touched=True, wait=wait, wait_for=wait_for)
    return loaded


def _arguments(request: LoadRequest[StreamedLoading]) -> StreamedLoading:
    """Return the checked arguments."""
    loading = request.loading
    if loading.extent_bytes < PAGE or loading.extent_bytes % PAGE:
        raise ConfigError(f"loading.extent_bytes={loading.extent_bytes} is not a positive multiple of {PAGE}")
    if loading.threads is not None and loading.threads < 1:
        raise ConfigError(f"loading.threads={loading.threads} is too small: the least is 1")
    if loading.ring_bytes < (loading.threads or 1) * SLOTS_A_THREAD * PAGE:
        raise ConfigError(f"loading.ring_bytes={loading.ring_bytes} is too small for {loading.threads or 1} threads")
    return loading


def _opened(request: LoadRequest, stack: ExitStack) -> list[ShardFile]:
    """Return the checkpoint's shards, open as long as `stack`."""
    checkpoint = request.checkpoint
    if checkpoint.file_format != "safetensors":
        raise LoadError(f"{checkpoint.folder} is {checkpoint.file_format}: only safetensors can be streamed")
    lengths: list[int | None] = [None] * len(checkpoint.shards)
    for entry in checkpoint.tensors:  # a header was only accepted where its tensors reach the end of the file
        memory.dtype_of(entry)
        lengths[entry.shard] = max(lengths[entry.shard] or 0, entry.end)
    return [
        stack.enter_context(ShardFile(path, length)) for path, length in zip(checkpoint.shards, lengths, strict=True)
    ]


def _plan(request: LoadRequest, loading: StreamedLoading, files: list[ShardFile], transfer: Transfer) -> Load:
    """Return what to read of each shard, how, and where to."""
    checkpoint = request.checkpoint
    mapping = request.weight_mapping or WeightMapping()
    layout = plan_layout(checkpoint, mapping, for_kernels=not transfer.on_host)

    def maps(shard: int) -> bool:  # pieces that are not cast are read to their places at once: one copy, no page faults
        return transfer.on_host and (shard not in layout.segments or layout.has_casts(shard))

    def stays(shard: int) -> bool:
        return transfer.on_host and shard not in layout.segments

    plans = make_plan(
        checkpoint, transfer.extent_bytes, transfer.query_residency, maps=maps, stays=stays, reading=loading.reading
    )
    extents = [extent for plan in plans for extent in plan.extents]
    return Load(files, plans, layout, ReadTracker(extents, checkpoint.tensors, mapping))
