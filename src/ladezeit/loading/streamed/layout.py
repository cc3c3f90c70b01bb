"""Where bytes go that do not simply stay as they lie in the file: tensors that are merged or cast on the way.

Such tensors lie in *arenas*, one a shard, and a shard is read in *pieces*: stretches of it that belong to one tensor.
An extent that is read brings whole and cut pieces alike; each goes to its place as soon as it is there.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.loading.base import WeightMapping
from ladezeit.loading.streamed.memory import dtype_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor

#: Tensors of an arena start at multiples of this many bytes, and so does a GPU's memory for a shard: as torch's own
#: allocations on a GPU do, for its libraries may choose another kernel for less, which would round otherwise.
ALIGNED = 512
#: What a GPU's kernels want of a weight's address: some refuse any other (grouped products of experts), some take
#: slower ways. Files only promise 8: where a header ends is where the first tensor begins.
_KERNELS_WANT = 16


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `begin` to `end` of a shard, and where they go: byte `offset` of an arena, cast where dtypes differ."""

    begin: int
    end: int
    arena: int
    offset: int
    source: torch.dtype
    target: torch.dtype

    def describe_move(self, arena: "Tensor", source: "Tensor", begin: int) -> "tuple[Tensor, Tensor]":
        """Return its place and its bytes, which lie in `source`, whose first byte is byte `begin` of the shard."""
        length = self.end - self.begin
        bytes_ = source[self.begin - begin :][:length]
        if not self.casts:
            return arena[self.offset : self.offset + length], bytes_
        size = length // self.source.itemsize * self.target.itemsize
        return arena[self.offset : self.offset + size].view(self.target), bytes_.view(self.source)

    def clip_range(self, begin: int, end: int) -> "Segment":
        """Return the part of the piece that lies in bytes `begin` to `end` of the shard."""
        begin, end = max(begin, self.begin), min(end, self.end)
        before = begin - self.begin
        if self.casts:  # whole elements: such a tensor starts at a multiple of its element's size, and so do extents
            before = before // self.source.itemsize * self.target.itemsize
        return Segment(begin, end, self.arena, self.offset + before, self.source, self.target)

    @property
    def casts(self) -> bool:
        """Whether the elements change."""
        return self.source != self.target


@dataclass(frozen=True)
class _Place:
    """A tensor as it is to be in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    arena: int
    offset: int


@dataclass
class Layout:
    """All arenas of a load, by the shard that asked for them, and which pieces of which shard fill them."""

    arena_bytes: dict[int, int] = field(default_factory=dict)
    segments: dict[int, list[Segment]] = field(default_factory=dict)
    _places: list[_Place] = field(default_factory=list)
    _begins: dict[int, list[int]] = field(default_factory=dict)

    def of_extent(self, shard: int, begin: int, end: int) -> Iterator[Segment]:
        """Yield the pieces of a shard between two of its bytes, cut to them, in the file's order."""
        pieces, begins = self.segments[shard], self._begins[shard]
        for number in range(max(0, bisect_right(begins, begin) - 1), len(pieces)):
            piece = pieces[number]
            if piece.begin >= end:
                return
            if piece.end > begin:
                yield piece if begin <= piece.begin and piece.end <= end else piece.clip_range(begin, end)

    def has_casts(self, shard: int) -> bool:
        """Whether any tensor of the shard is cast."""
        return any(piece.casts for piece in self.segments[shard])

    def view_tensors(self, arenas: "dict[int, Tensor]") -> "dict[str, Tensor]":
        """Return the tensors in `arenas` by name; each arena holds bytes."""
        found = {}
        for place in self._places:
            size = math.prod(place.shape) * place.dtype.itemsize
            part = arenas[place.arena][place.offset : place.offset + size]
            found[place.name] = part.view(place.dtype).view(place.shape)
        return found

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, arena: int) -> int:
        offset = self.arena_bytes.get(arena, 0)
        size = math.prod(shape) * dtype.itemsize
        self._places.append(_Place(name, shape, dtype, arena, offset))
        self.arena_bytes[arena] = offset + -(-size // ALIGNED) * ALIGNED
        return offset

    def _put(self, entry: TensorEntry, arena: int, offset: int, target: torch.dtype) -> None:
        if entry.end > entry.begin:
            piece = Segment(entry.begin, entry.end, arena, offset, dtype_of(entry), target)
            self.segments[entry.shard].append(piece)


def plan_layout(checkpoint: Checkpoint, mapping: WeightMapping, *, for_kernels: bool) -> Layout:
    """Return the places of all tensors in those shards that have any tensor to merge or to cast; others have none.

    Where they are `for_kernels` of a GPU, shards count too whose tensors no shift of the whole would align.
    """
    layout = Layout()
    casts = {
        entry.name: mapping.dtypes[entry.name]
        for entry in checkpoint.tensors
        if entry.name in mapping.dtypes and entry.begin % dtype_of(entry).itemsize == 0
    }
    inside = {part.entry.name for merged in mapping.fused for part in merged.slices}
    shards = {entry.shard for entry in checkpoint.tensors if entry.name in inside or entry.name in casts}
    if for_kernels:
        residues = {
            (entry.shard, entry.begin % _KERNELS_WANT) for entry in checkpoint.tensors if entry.begin < entry.end
        }
        counts = Counter(shard for shard, _ in residues)
        shards |= {shard for shard, count in counts.items() if count > 1}
    layout.segments = {shard: [] for shard in shards}
    for merged in mapping.fused:
        first = merged.slices[0].entry
        whole = all(part.entry.name in casts for part in merged.slices)
        target = casts[first.name] if whole else dtype_of(first)
        offset = layout._add(merged.name, merged.shape, target, first.shard)
        for part in merged.slices:
            layout._put(part.entry, first.shard, offset + part.start * target.itemsize, target)
    for entry in checkpoint.tensors:
        if entry.shard in shards and entry.name not in inside:
            target = casts.get(entry.name, dtype_of(entry))
            offset = layout._add(entry.name, shape_of(entry), target, entry.shard)
            layout._put(entry, entry.shard, offset, target)
    for pieces in layout.segments.values():
        pieces.sort(key=lambda piece: piece.begin)
    layout._begins = {shard: [piece.begin for piece in pieces] for shard, pieces in layout.segments.items()}
    return layout
