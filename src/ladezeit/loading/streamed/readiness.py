"""Which bytes of a load are there while others are under way: whoever wants a tensor waits for its own bytes alone.

A model takes its tensors by name, layer after layer, so they are read in that order, and each is taken while later ones
are read. Extents may come in any order, from any thread.
"""

import re
import threading
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.loading.base import WeightMapping
from ladezeit.loading.streamed.plan import Extent

#: Who waits is woken this often in a load at most: each time takes a processor from a reader.
_WAKINGS = 16

_NUMBER = re.compile(r"(\d+)")


class ReadTracker:
    """The extents that a load waits for; one thread at a time may wait.

    An extent's number is its place in `extents`, where those of a shard follow each other in the file's order.

    Args:
        extents: all there are, in that order.
        tensors: all of the checkpoint.
        mapping: which of them become one, under a name of its own.
    """

    def __init__(self, extents: Sequence[Extent], tensors: Iterable[TensorEntry], mapping: WeightMapping) -> None:
        self.extents = extents
        #: One byte an extent, by its number: 1 where it has arrived; never empty, so that it can be lent to C.
        self.flags = bytearray(max(1, len(extents)))
        self._sources = _sources(tensors, mapping)
        self._first: dict[int, int] = {}
        self._begins: dict[int, list[int]] = {}
        for number, extent in enumerate(extents):
            self._first.setdefault(extent.shard, number)
            self._begins.setdefault(extent.shard, []).append(extent.begin)
        #: Numbers of all extents, each once, as their tensors are wanted.
        self.order = self._ordered()
        self._left = len(extents)
        self._step = max(1, len(extents) // _WAKINGS)
        self._wake_at = 0
        self._changed = threading.Condition()
        self._ended = False
        self._wait_by: Callable[[int, int], bool] | None = None

    @property
    def in_order(self) -> list[Extent]:
        """All extents, each once, as their tensors are wanted."""
        return [self.extents[number] for number in self.order]

    def of_shards(self) -> Iterator[tuple[int, range]]:
        """Yield each shard and the numbers of its extents."""
        for shard, begins in self._begins.items():
            yield shard, range(self._first[shard], self._first[shard] + len(begins))

    def wait_by(self, wait: Callable[[int, int], bool]) -> None:
        """Leave flags and waiting to somebody else: `wait` returns when extents from one number to another are there.

        It returns False where they will not come.
        """
        self._wait_by = wait

    def mark_read(self, extent: Extent) -> None:
        """Say that the bytes of `extent` are where they belong."""
        number = self._first[extent.shard] + bisect_right(self._begins[extent.shard], extent.begin) - 1
        with self._changed:
            self.flags[number] = 1
            self._left -= 1
            if self._left <= self._wake_at:
                self._changed.notify_all()

    def mark_ended(self) -> None:
        """Say that no more will come, whatever is missing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def is_read(self, name: str) -> bool:
        """Return whether all bytes of a tensor are there."""
        return all(self.flags.find(0, begin, end) < 0 for begin, end in self._of(name))

    def wait_read(self, name: str) -> bool:
        """Wait for all bytes of a tensor, and some of what comes after it; return False where they will not come."""
        if self._wait_by is not None:
            for begin, end in self._of(name):
                self._wait_by(begin, end)
            return self.is_read(name)
        with self._changed:
            while not self._ended and not self.is_read(name):
                self._wake_at = max(0, self._left - self._step)
                self._changed.wait()
            return self.is_read(name)

    def _of(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield for each shard the numbers of the first extent that a tensor needs, and of the first after these."""
        for shard, (begin, end) in self._sources[name].items():
            begins, first = self._begins[shard], self._first[shard]
            yield first + bisect_right(begins, begin) - 1, first + bisect_left(begins, end)

    def _ordered(self) -> list[int]:
        taken, order = bytearray(len(self.extents)), []
        for name in sorted(self._sources, key=_in_natural_order):
            for begin, end in self._of(name):
                for number in range(begin, end):
                    if not taken[number]:
                        taken[number] = 1
                        order.append(number)
        return order + [number for number in range(len(taken)) if not taken[number]]


def _sources(tensors: Iterable[TensorEntry], mapping: WeightMapping) -> dict[str, dict[int, tuple[int, int]]]:
    """Return for each tensor of a load, by its name, the first and last byte that it needs of each shard.

    Where parts are merged, what lies between them counts as needed: they are a layer's experts, which lie together.
    """
    merged = {part.entry.name: one.name for one in mapping.fused for part in one.slices}
    sources: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    for entry in tensors:
        own = sources[merged.get(entry.name, entry.name)]
        if entry.begin < entry.end:
            begin, end = own.get(entry.shard, (entry.begin, entry.end))
            own[entry.shard] = min(begin, entry.begin), max(end, entry.end)
    return dict(sources)


def _in_natural_order(name: str) -> list[str | int]:
    """Sort layer 2 before layer 10, as the library does."""
    return [int(part) if part.isdigit() else part for part in _NUMBER.split(name)]
