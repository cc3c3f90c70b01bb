"""Host memory as the place where weights stay: read into it, mapped into it, or put there piece by piece."""

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ladezeit.loading.streamed import memory
from ladezeit.loading.streamed.layout import Layout
from ladezeit.loading.streamed.memory import ShardFile
from ladezeit.loading.streamed.plan import Extent, ReadMethod, ShardPlan
from ladezeit.system.limits import available_cpus

if TYPE_CHECKING:
    from torch import Tensor


#: A thread's first reads are of so many bytes, the next of whole extents: pages are found for what is read, and the
#: disk has nothing to do until they are for the first two, which of 32 MiB each takes 15 ms.
_FIRST_READS = (2 * 2**20, 6 * 2**20)

#: Between these two torch casts element by element (2.0 to 4.3 GB/s in one thread); to float32 and from it by vectors,
#: so that both steps make 7 to 10 of it. What is a number becomes the same one either way.
_HALVES = {torch.float16, torch.bfloat16}

#: So many elements are float32 at a time: few enough to stay in a processor's caches, enough that calls do not count.
#: Bringing 3 GB took 0.70 s (quartiles 0.67, 0.89), with half or twice as many 0.83, and without the step 0.86 (0.72,
#: 0.93; n = 24 in turn, two processors).
_BLOCK = 2**20


# Elements of one dtype put into memory of another, on the host, in one thread at a time.


class Casting:
    """Copies and casts, for one thread: it keeps the memory that a cast by two steps needs."""

    def __init__(self) -> None:
        self._floats: Tensor | None = None

    def write_cast(self, target: "Tensor", elements: "Tensor") -> None:
        """Write flat `elements` into `target`, bit for bit as ``target.copy_(elements)`` would."""
        if target.dtype == elements.dtype or not {target.dtype, elements.dtype} <= _HALVES:
            target.copy_(elements)
            return
        if self._floats is None:
            self._floats = torch.empty(_BLOCK, dtype=torch.float32, device="cpu")
        for begin in range(0, elements.numel(), _BLOCK):
            block = elements[begin : begin + _BLOCK]
            floats = self._floats[: block.numel()]
            floats.copy_(block)
            # Only what is NaN comes out otherwise by the other way; the maximum is NaN where any element is.
            all_numbers = not math.isnan(floats.numpy().max())
            target[begin : begin + _BLOCK].copy_(floats if all_numbers else block)

    def close(self) -> None:
        """Let go of the memory."""
        self._floats = None


class HostPlace:
    """Brings extents into host memory, for as many threads as there are.

    A shard whose tensors are as the model wants them is one piece of memory, mapped where the page cache has it. Of
    other shards each tensor has its place in an arena: what is cached is cast out of the mapping or read straight to
    its places, what is not comes through a thread's own slot.

    Args:
        plans: of all shards.
        files: of all shards, open.
        layout: where the pieces of merged and cast tensors go.
        extent_bytes: the most that is read at once.
    """

    def __init__(self, plans: list[ShardPlan], files: list[ShardFile], layout: Layout, extent_bytes: int) -> None:
        # Threads beyond the processors wait for the disk; what is in memory they would only take from each other.
        self._processors = threading.Semaphore(available_cpus())
        self._files, self._layout, self._extent_bytes = files, layout, extent_bytes
        self._plans = plans
        self.spans: dict[int, Tensor] = {}
        for plan, file in zip(plans, files, strict=True):
            if plan.mapped:
                self.spans[plan.shard] = memory.map_shard(plan, file)
            elif plan.shard not in layout.segments:
                self.spans[plan.shard] = memory.allocate_anonymous(plan.end - plan.base)
        self.arenas = {arena: memory.allocate_anonymous(size) for arena, size in layout.arena_bytes.items()}
        self._span_views = {shard: memory.writable_view(span) for shard, span in self.spans.items()}
        self._arena_views = {arena: memory.writable_view(bytes_) for arena, bytes_ in self.arenas.items()}

    def make_reader(self, arrived: Callable[[Extent], None]) -> "HostReader":
        """Return what brings extents in one thread, and tells `arrived` of each."""
        return HostReader(self, arrived)

    def read_extent(self, extent: Extent, own: "HostReader") -> None:
        """Bring an extent to its place by what the thread that asks has of its own."""
        if extent.shard not in self._layout.segments:
            self._in_place(extent, own.first_reads)
        elif extent.how is ReadMethod.mapped:
            with self._processors:
                self._from_mapping(extent, own.casting)
        elif extent.how is ReadMethod.buffered and not self._layout.has_casts(extent.shard):
            self._scattered(extent)
        else:
            if own.slot is None:
                own.slot = memory.allocate_anonymous(self._extent_bytes)
            self._through(own.slot, extent, own.casting)

    def _in_place(self, extent: Extent, first_reads: deque[int]) -> None:
        span, base = self.spans[extent.shard], self._plans[extent.shard].base
        file = self._files[extent.shard]
        if extent.how is ReadMethod.mapped:
            with self._processors:
                memory.fault_in_extent(extent, span[extent.begin - base :], file)
            return
        begin = extent.begin
        while begin < extent.end:
            end = min(extent.end, begin + first_reads.popleft()) if first_reads else extent.end
            with self._processors:  # or all threads are at it together, no disk is asked, and no model is built
                memory.populate_pages(span[begin - base : end - base])
            file.read(replace(extent, begin=begin, end=end), self._span_views[extent.shard][begin - base :])
            begin = end

    def _from_mapping(self, extent: Extent, casting: Casting) -> None:
        base = self._plans[extent.shard].base
        mapped = self.spans[extent.shard][extent.begin - base :]
        memory.fault_in_extent(extent, mapped, self._files[extent.shard])
        self._put(extent, mapped, casting)
        memory.release_pages(extent, mapped)

    def _scattered(self, extent: Extent) -> None:
        places = [
            (piece.begin, self._arena_views[piece.arena][piece.offset : piece.offset + piece.end - piece.begin])
            for piece in self._layout.of_extent(extent.shard, extent.begin, extent.end)
        ]
        self._files[extent.shard].read_scattered(extent, places)

    def _through(self, slot: "Tensor", extent: Extent, casting: Casting) -> None:
        self._files[extent.shard].read(extent, memory.writable_view(slot))
        with self._processors:
            self._put(extent, slot, casting)

    def _put(self, extent: Extent, source: "Tensor", casting: Casting) -> None:
        """Put an extent's bytes, which are the start of `source`, where they belong."""
        for piece in self._layout.of_extent(extent.shard, extent.begin, extent.end):
            casting.write_cast(*piece.describe_move(self.arenas[piece.arena], source, extent.begin))


class HostReader:
    """Brings extents into host memory, in one thread. See `readers.Reader`."""

    def __init__(self, place: HostPlace, arrived: Callable[[Extent], None]) -> None:
        self._place, self._arrived = place, arrived
        self.slot: Tensor | None = None
        self.casting = Casting()
        self.first_reads = deque(_FIRST_READS)

    def begin_reading(self) -> None:
        """Nothing: where the bytes go was found before."""

    def read_extent(self, extent: Extent) -> None:
        """Bring one extent to its place."""
        self._place.read_extent(extent, self)
        self._arrived(extent)

    def finish_reading(self) -> None:
        """Let go of the thread's memory."""
        self.slot = None
        self.casting.close()
