"""One shard, open to be read in parallel: buffered, or past the page cache where the file system lets us.

Descriptors are shared by all threads: `os.preadv` carries its own position and gives other threads the interpreter.
"""

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ladezeit.checkpoint.residency import ResidencyProbe, resident_ranges
from ladezeit.errors import CheckpointError, LoadError
from ladezeit.loading.streamed.plan import PAGE, Extent, How

#: What the kernel or a file system answers where it cannot read past the page cache (into this memory).
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT, errno.ENOSYS)
#: Fewer than IOV_MAX, which is 1,024 on Linux, because what lies between two parts takes one too.
_MOST_VECTORS = 1000


class ShardFile:
    """A shard from its opening to its closing, and the proof that it stayed the same meanwhile.

    `direct_refused` is None, or why direct I/O was tried and not had; the counts are in bytes.

    Raises:
        CheckpointError: it cannot be opened, or does not have `file_bytes` bytes (any more); None leaves that open.
    """

    def __init__(self, path: Path, file_bytes: int | None) -> None:
        self.path = path
        self.direct_refused: str | None = None
        self.read_bytes = {How.buffered: 0, How.direct: 0}
        #: Who said what of it is in the page cache; None before anybody was asked.
        self.residency_by: str | None = None
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._probe: ResidencyProbe | None = None
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as cause:
            raise CheckpointError(f"{path} cannot be opened: {cause.strerror}. Fetch the checkpoint again") from cause
        self._status = os.fstat(self.descriptor)
        if file_bytes not in (None, self._status.st_size):
            self.close()
            raise CheckpointError(
                f"{path} has {self._status.st_size} bytes, and had {file_bytes} when its header was read: it was "
                f"changed meanwhile. Let its writer finish, or fetch the checkpoint again"
            )

    @property
    def size(self) -> int:
        """Its length in bytes when it was opened."""
        return self._status.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open; may be called twice."""
        for descriptor in (self.descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self.descriptor, self._direct = -1, None

    def resident_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bool]:
        """Return whether each range of bytes is in the page cache, by a few of its pages."""
        found, self.residency_by = resident_ranges(self.descriptor, self.path, ranges)
        return found

    def resident(self, begin: int, end: int) -> bool:
        """Return whether a range of bytes is in the page cache; for threads that ask just before they read."""
        with self._lock:
            if self._probe is None:
                self._probe = ResidencyProbe(self.descriptor, self.path)
        found = self._probe.resident(begin, end)
        self.residency_by = self._probe.teller
        return found

    def told_by_cachestat(self) -> bool:
        """Say whether one call of cachestat tells what of it is in the page cache."""
        self.resident(0, PAGE)
        return self.residency_by == "cachestat"

    def read(self, extent: Extent, memory: memoryview) -> None:
        """Read `extent` to the start of `memory`, which begins on a page and holds whole pages.

        Raises:
            LoadError: the file ends too early, or the disk reports an error; names file and offset.
        """
        how = extent.how
        done = self._read_direct(extent, memory) if how is How.direct else 0
        with self._lock:
            self.read_bytes[How.direct] += done
            self.read_bytes[How.buffered] += extent.size - done
        while done < extent.size:
            done += self._preadv(self.descriptor, [memory[done : extent.size]], extent.begin + done)

    def read_scattered(self, extent: Extent, places: Sequence[tuple[int, memoryview]]) -> None:
        """Read parts of `extent` through the page cache, each to its own memory, in as few calls as the system allows.

        Args:
            extent: whose parts are read.
            places: first byte in the file, and memory of the part's length; in the file's order, without overlap.

        Raises:
            LoadError: as `read`.
        """
        with self._lock:
            self.read_bytes[How.buffered] += extent.size
        start = 0
        while start < len(places):
            batch: list[memoryview] = []
            position = places[start][0]
            while start < len(places) and len(batch) < _MOST_VECTORS:
                begin, memory = places[start]
                if begin > position:  # what lies between two parts is read to nowhere
                    batch.append(memoryview(bytearray(begin - position)))
                batch.append(memory)
                position = begin + len(memory)
                start += 1
            self._fill(batch, position - sum(map(len, batch)))

    def _fill(self, memories: list[memoryview], offset: int) -> None:
        while memories:
            count = self._preadv(self.descriptor, memories, offset)
            offset += count
            while memories and count >= len(memories[0]):
                count -= len(memories.pop(0))
            if count:
                memories[0] = memories[0][count:]

    def check_unchanged(self) -> None:
        """Raise `LoadError` where the file was written to since it was opened."""
        now, before = os.fstat(self.descriptor), self._status
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise LoadError(f"{self.path} was changed while it was read. Let its writer finish, then load again")

    def failed(self, offset: int, reason: str) -> LoadError:
        """Return the error to raise where the bytes at `offset` cannot be had."""
        return LoadError(f"{self.path}: the bytes at offset {offset} cannot be read: {reason}")

    def _read_direct(self, extent: Extent, memory: memoryview) -> int:
        """Return how many bytes were read past the page cache: all, or fewer where that is refused."""
        descriptor, done = self.direct_descriptor(), 0
        whole = -(-extent.size // PAGE) * PAGE  # the file's last block is read whole, its end is cut by the kernel
        # After a read that did not end on a page the next would be misaligned: the rest is left to a buffered one.
        while descriptor is not None and done < extent.size and done % PAGE == 0:
            try:
                done += self._preadv(descriptor, [memory[done:whole]], extent.begin + done)
            except LoadError as error:
                cause = error.__cause__
                if not isinstance(cause, OSError) or cause.errno not in _REFUSALS:
                    raise
                self.direct_refused = f"{cause.strerror} at offset {extent.begin + done}"
                descriptor = None
        return min(done, extent.size)

    def direct_descriptor(self) -> int | None:
        """Return a descriptor that reads past the page cache; None where that was refused."""
        with self._lock:
            if self._direct is None and self.direct_refused is None:
                try:
                    # By the open descriptor, so that a file put in its place meanwhile is not the one that is read.
                    name = f"/proc/self/fd/{self.descriptor}"
                    self._direct = os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                except OSError as cause:
                    self.direct_refused = f"{cause.strerror} when it was opened"
            return None if self.direct_refused is not None else self._direct

    def _preadv(self, descriptor: int, memories: list[memoryview], offset: int) -> int:
        try:
            count = os.preadv(descriptor, memories, offset)
        except OSError as cause:
            raise self.failed(offset, cause.strerror or str(cause)) from cause
        if count == 0:
            raise self.failed(offset, "the file became shorter")
        return count
