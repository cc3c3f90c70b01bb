"""The arguments of the engine `streamed`."""

from dataclasses import dataclass
from enum import Enum

from ladezeit.config import TensorLoading


class Reading(Enum):
    """How our own reader gets at bytes: each part by whether it is in the page cache, or all alike."""

    by_residency = "by_residency"
    direct = "direct"
    buffered = "buffered"
    mapped = "mapped"


class Readers(Enum):
    """Whose threads read for a GPU: compiled ones where they can (what is cast they leave to Python's), or one kind."""

    auto = "auto"
    native = "native"
    python = "python"


@dataclass
class StreamedLoading(TensorLoading):
    """Arguments of our own reader.

    `extent_bytes` is the most that goes through a buffer at once, a multiple of a page; where bytes stay in host
    memory, up to four times as much is read at once. `ring_bytes` bounds the pinned host memory on the way to a GPU.
    `reading` other than `by_residency` and `readers` other than `auto` are there to be compared with these.
    """

    engine: str = "streamed"
    extent_bytes: int = 8 * 2**20
    ring_bytes: int = 256 * 2**20
    reading: Reading = Reading.by_residency
    readers: Readers = Readers.auto
