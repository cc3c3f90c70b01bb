"""Cuts the shards of a checkpoint into extents to read, and decides for each how.

A *span* is a stretch of one file that lies in one piece of memory: byte `base` of the file is byte 0 of that memory.
`base` is a multiple of a page, so an offset is aligned alike in both, which direct I/O needs; where the bytes stay in
host memory it is one of a large page, so that reads go to whole large pages, which is 1.4 % of a cold load of 3 GB.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.loading.streamed.arguments import Reading
from ladezeit.system.memory_warmup import LARGE_PAGE

PAGE = mmap.PAGESIZE
#: Stretches that no tensor needs and that are shorter than this are read along: one large read beats two.
_GAP_BYTES = 64 * 1024
#: So many extents that are brought in one way are one where they stay where they are brought to, and no buffer has to
#: hold them. Of 3 GB on a virtual disk, direct reads of 32 MiB took 1.48 s and of 8 MiB 1.56, where the disk alone took
#: 1.40; a warm load by two threads took 0.117 s instead of 0.146 (n = 70), for a thread that is done with a part may
#: wait milliseconds for the interpreter until it can begin another.
_JOINED = 4
#: The kernel allows a process 65,530 mappings; a shard that would need more than this many is copied instead.
_MOST_PIECES = 1000

#: Which of some ranges of a shard, by its number, are in the page cache.
ResidencyQuery = Callable[[int, Sequence[tuple[int, int]]], list[bool]]


class ReadMethod(Enum):
    """How an extent gets into memory; `by_residency` is settled by the thread that reads it, just before it does."""

    mapped = "mapped"
    buffered = "buffered"
    direct = "direct"
    by_residency = "by_residency"


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `begin` to `end` of a shard, read at once; `begin` is a multiple of a page."""

    shard: int
    begin: int
    end: int
    how: ReadMethod

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class ShardPlan:
    """What is read of one shard: all of its tensors lie in the bytes ``base`` to ``end`` of the file."""

    shard: int
    tensors: tuple[TensorEntry, ...]
    base: int
    end: int
    extents: tuple[Extent, ...]

    @property
    def mapped(self) -> bool:
        """Whether the file itself becomes the memory of its tensors, wholly or in parts."""
        return any(extent.how is ReadMethod.mapped for extent in self.extents)


def make_plan(
    checkpoint: Checkpoint,
    extent_bytes: int,
    ask: ResidencyQuery | None,
    *,
    maps: Callable[[int], bool],
    stays: Callable[[int], bool],
    reading: Reading = Reading.by_residency,
) -> list[ShardPlan]:
    """Return what to read of each shard, in file order.

    Args:
        checkpoint: whose headers were checked.
        extent_bytes: the most that is looked up or goes through a buffer at once, a multiple of a page.
        ask: tells which parts are in the page cache; None leaves that to the threads that read.
        maps: tells of a shard, by its number, whether what is in memory is mapped instead of copied.
        stays: tells of a shard whether its bytes stay where they are read to.
        reading: `by_residency`, or one way for all; what cannot be mapped is read through the page cache instead.
    """
    of_shard: list[list[TensorEntry]] = [[] for _ in checkpoint.shards]
    for tensor in checkpoint.tensors:
        of_shard[tensor.shard].append(tensor)
    plans = []
    for shard, tensors in enumerate(of_shard):
        ranges = list(_ranges(tensors, extent_bytes))
        if reading is Reading.by_residency and ask is None:
            hows = [ReadMethod.by_residency] * len(ranges)
        elif reading is Reading.by_residency:
            assert ask is not None
            hows = _decide(ask(shard, ranges) if ranges else [], maps(shard))
        else:
            how = ReadMethod[reading.value]
            hows = [ReadMethod.buffered if how is ReadMethod.mapped and not maps(shard) else how] * len(ranges)
        extents = [Extent(shard, begin, end, how) for (begin, end), how in zip(ranges, hows, strict=True)]
        if stays(shard):
            extents = _joined(extents, _JOINED * extent_bytes)
        base = ranges[0][0] if ranges else 0
        if stays(shard):
            base -= base % LARGE_PAGE
        end = max((tensor.end for tensor in tensors), default=0)
        plans.append(ShardPlan(shard, tuple(tensors), base, max(base, end), tuple(extents)))
    return plans


def _decide(in_memory: list[bool], mapping: bool) -> list[ReadMethod]:
    pieces = 1 + sum(one != other for one, other in pairwise(in_memory))
    cached = ReadMethod.mapped if mapping and pieces <= _MOST_PIECES else ReadMethod.buffered
    return [cached if resident else ReadMethod.direct for resident in in_memory]


def _joined(extents: list[Extent], most_bytes: int) -> list[Extent]:
    """Return `extents` with those of one kind that follow each other as one, of `most_bytes` at most."""
    found: list[Extent] = []
    for extent in extents:
        last = found[-1] if found else None
        if (
            last is not None
            and last.how is extent.how
            and last.end == extent.begin
            and extent.end - last.begin <= most_bytes
        ):
            found[-1] = Extent(last.shard, last.begin, extent.end, last.how)
        else:
            found.append(extent)
    return found


def _ranges(tensors: list[TensorEntry], extent_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield page-aligned starts and ends, in order and without overlap, that together cover all `tensors`."""
    runs: list[tuple[int, int]] = []
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin == tensor.end:
            continue
        if runs and tensor.begin - runs[-1][1] < _GAP_BYTES:
            runs[-1] = (runs[-1][0], max(runs[-1][1], tensor.end))
        else:
            runs.append((tensor.begin - tensor.begin % PAGE, tensor.end))
    for first, last in runs:
        begin = first
        while begin < last:
            end = min(last, (begin // extent_bytes + 1) * extent_bytes)
            yield begin, end
            begin = end
