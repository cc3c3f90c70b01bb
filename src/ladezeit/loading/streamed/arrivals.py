"""Which bytes of a load are there while others are under way: whoever wants a tensor waits for its own bytes alone.

A model takes its tensors by name, layer after layer, so they are read in that order, and each is taken while later ones
are read. Extents may come in any order, from any thread.
"""

import re
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from ladezeit.checkpoint.headers import TensorEntry
from ladezeit.loading.arrangement import Arrangement
from ladezeit.loading.streamed.plan import Extent

#: Who waits is woken this often in a load at most: each time takes a processor from a reader.
_WAKINGS = 16

_NUMBER = re.compile(r"(\d+)")


class Arrivals:
    """The extents that a load waits for.

    Args:
        extents: all there are.
        tensors: all of the checkpoint.
        arrangement: which of them become one, under a name of its own.
    """

    def __init__(self, extents: Sequence[Extent], tensors: Iterable[TensorEntry], arrangement: Arrangement) -> None:
        self._sources = _sources(tensors, arrangement)
        self._extents: dict[int, list[Extent]] = defaultdict(list)
        for extent in sorted(extents, key=lambda extent: extent.begin):
            self._extents[extent.shard].append(extent)
        self._begins = {shard: [extent.begin for extent in own] for shard, own in self._extents.items()}
        names = sorted(self._sources, key=_in_natural_order)
        wanted = (extent for name in names for extent in self._of(name))
        #: All extents, each once, as their tensors are wanted.
        self.in_order = list(dict.fromkeys([*wanted, *extents]))
        self._missing = set(extents)
        self._step = max(1, len(extents) // _WAKINGS)
        self._wake_at = 0
        self._changed = threading.Condition()
        self._ended = False

    def arrived(self, extent: Extent) -> None:
        """Say that the bytes of `extent` are where they belong."""
        with self._changed:
            self._missing.discard(extent)
            if len(self._missing) <= self._wake_at:
                self._changed.notify_all()

    def end(self) -> None:
        """Say that no more will come, whatever is missing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def has(self, name: str) -> bool:
        """Return whether all bytes of a tensor are there."""
        return not self._missing or self._missing.isdisjoint(self._of(name))

    def wait(self, name: str) -> bool:
        """Wait for all bytes of a tensor, and some of what comes after it; return False where they will not come."""
        own = list(self._of(name))
        with self._changed:
            while not self._ended and not self._missing.isdisjoint(own):
                self._wake_at = max(0, len(self._missing) - self._step)
                self._changed.wait()
            return self._missing.isdisjoint(own)

    def _of(self, name: str) -> Iterator[Extent]:
        for shard, (begin, end) in self._sources[name].items():
            extents = self._extents[shard]
            for number in range(bisect_right(self._begins[shard], begin) - 1, len(extents)):
                if extents[number].begin >= end:
                    break
                yield extents[number]


def _sources(tensors: Iterable[TensorEntry], arrangement: Arrangement) -> dict[str, dict[int, tuple[int, int]]]:
    """Return for each tensor of a load, by its name, the first and last byte that it needs of each shard.

    Where parts are merged, what lies between them counts as needed: they are a layer's experts, which lie together.
    """
    merged = {part.entry.name: one.name for one in arrangement.merged for part in one.parts}
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
