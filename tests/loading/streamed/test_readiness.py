"""The order in which a load's bytes are read, and what counts as there."""

import threading

from ladezeit.checkpoint.safetensors_header import TensorEntry
from ladezeit.loading.base import FusedParameter, Slice, WeightMapping
from ladezeit.loading.streamed.plan import Extent, ReadMethod
from ladezeit.loading.streamed.readiness import ReadTracker


def entries(*names: str) -> list[TensorEntry]:
    return [TensorEntry(name, "U8", (10,), 0, 10 * n, 10 * n + 10) for n, name in enumerate(names)]


def extents(count: int, size: int = 10) -> list[Extent]:
    return [Extent(0, size * n, size * (n + 1), ReadMethod.direct) for n in range(count)]


def test_layers_are_read_as_the_model_takes_them() -> None:
    """Files have layer 10 before layer 2; a model takes them in the order of their numbers."""
    tensors = entries("layers.0.w", "layers.1.w", "layers.10.w", "layers.2.w", "embed")
    arrivals = ReadTracker(extents(5), tensors, WeightMapping())
    assert [extent.begin for extent in arrivals.in_order] == [40, 0, 10, 30, 20]


def test_everything_is_read_once() -> None:
    """What holds parts of several tensors, or of none, is neither forgotten nor read twice."""
    whole = [*extents(3, 20), Extent(0, 60, 70, ReadMethod.direct), Extent(1, 0, 10, ReadMethod.direct)]
    arrivals = ReadTracker(whole, entries("a", "b", "c", "d", "e"), WeightMapping())
    assert sorted(arrivals.in_order, key=whole.index) == whole


def test_a_tensor_is_there_when_its_last_byte_is() -> None:
    """A weight that is read in parts, in any order, is given out whole."""
    tensors = [TensorEntry("a", "U8", (25,), 0, 5, 30), TensorEntry("none", "U8", (0,), 0, 30, 30)]
    parts = extents(3)
    arrivals = ReadTracker(parts, tensors, WeightMapping())
    assert arrivals.is_read("none") and not arrivals.is_read("a")
    arrivals.mark_read(parts[2])
    arrivals.mark_read(parts[0])
    assert not arrivals.is_read("a")
    threading.Timer(0.05, arrivals.mark_read, [parts[1]]).start()
    assert arrivals.wait_read("a") and arrivals.is_read("a")


def test_merged_tensors_need_all_their_parts() -> None:
    """Experts that become one weight are waited for together, also where they lie in different shards."""
    first, second = TensorEntry("e.0", "U8", (10,), 0, 0, 10), TensorEntry("e.1", "U8", (10,), 1, 0, 10)
    merged = FusedParameter("experts", (2, 10), "U8", (Slice(first, 0), Slice(second, 10)), (("e.0", "e.1"),))
    parts = [Extent(0, 0, 10, ReadMethod.direct), Extent(1, 0, 10, ReadMethod.direct)]
    arrivals = ReadTracker(parts, [first, second], WeightMapping(fused=(merged,)))
    arrivals.mark_read(parts[0])
    assert not arrivals.is_read("experts")
    arrivals.mark_read(parts[1])
    assert arrivals.is_read("experts")


def test_who_waits_for_what_never_comes_is_told() -> None:
    """An end before the last byte wakes everybody: a load hangs for nothing."""
    arrivals = ReadTracker(extents(2), entries("a", "b"), WeightMapping())
    arrivals.mark_read(extents(2)[0])
    threading.Timer(0.05, arrivals.mark_ended).start()
    assert not arrivals.wait_read("b")
    assert arrivals.wait_read("a")
