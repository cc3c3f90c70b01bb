"""Makes none, half or all of a checkpoint's files lie in the page cache, verified by looking again; needs no root."""

import errno
import math
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ladezeit.config import CacheState
from ladezeit.errors import CheckpointError, NotRunnableError
from ladezeit.system.residency import filesystem_type, may_ask, resident_pages

#: Resident shares that count as cold (below) and as warm (above).
COLD_BELOW = 0.01
WARM_ABOVE = 0.99
#: How far from one half a half-cached checkpoint may be.
HALF_WITHIN = 0.05

_WINDOW_BYTES = 2**30
_READ_BYTES = 8 * 2**20
#: What is cached in one piece of a half-cached file, and into how many pieces even a small one is cut.
_BLOCK_BYTES = 32 * 2**20
_LEAST_BLOCKS = 16
_READERS = 4
_DROPS = 5
_READS = 3
#: File systems whose files have no place but memory.
_IN_MEMORY = ("tmpfs", "ramfs")
_PROBE_BYTES = 2**20

_ONLY_OWNERS = (
    ": the system answers only those who own or may write a file. Run as the files' owner, or use cache=as_is"
)


@dataclass(frozen=True)
class CacheReport:
    """What setting a cache state came to: shares of the files' pages in memory, and how long it took."""

    asked: CacheState
    resident_before_share: float
    resident_after_share: float
    seconds: float


def resident_bytes(path: Path) -> int:
    """Return how many bytes of the file are in the page cache, in whole pages.

    Raises:
        CheckpointError: the file cannot be opened, or the system does not tell us.
    """
    if _size(path) == 0:
        return 0
    if not may_ask(path):
        raise CheckpointError(f"which pages of {path} are in memory is unknown{_ONLY_OWNERS}")
    with open_file(path) as descriptor:
        found = resident_pages(descriptor, path, [(0, os.fstat(descriptor).st_size)])
    if found is None:
        raise CheckpointError(f"the system does not tell which pages of {path} are in memory")
    return found[0][0] * mmap.PAGESIZE


def resident_share(paths: Sequence[Path]) -> float:
    """Return which share of all pages of `paths` is in the page cache, 0.0 to 1.0; NaN where that is not told."""
    total = sum(-(-_size(path) // mmap.PAGESIZE) for path in paths) * mmap.PAGESIZE
    if not all(may_ask(path) for path in paths):
        return math.nan
    return sum(resident_bytes(path) for path in paths) / total if total else 1.0


def drop_pages(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget the pages of `paths`, written back first; pages that a process has mapped stay."""
    for path in paths:
        with open_file(path) as descriptor:
            os.fsync(descriptor)
            for _ in range(_DROPS):  # pages still on their way into the kernel's lists escape the first time
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if may_ask(path) and resident_bytes(path) == 0:
                    break
                time.sleep(0.02)


def warm_pages(paths: Sequence[Path]) -> None:
    """Read every byte of `paths` once, a few threads into one buffer each.

    Raises:
        CheckpointError: a file cannot be read.
    """
    spans = [(path, start) for path in paths for start in range(0, _size(path), _WINDOW_BYTES)]
    buffers = threading.local()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="warm") as pool:
        for _ in pool.map(lambda span: _read_span(span[0], span[1], buffers), spans):
            pass


def halve_pages(paths: Sequence[Path]) -> None:
    """Leave every other block of `paths` in the page cache, as a cache that was too small does; blocks are at most
    `_BLOCK_BYTES` long.

    Raises:
        CheckpointError: a file cannot be read.
    """
    drop_pages(paths)
    buffer = mmap.mmap(-1, _BLOCK_BYTES)
    for path in paths:
        size = _size(path)
        block = min(_BLOCK_BYTES, -(-size // _LEAST_BLOCKS // mmap.PAGESIZE) * mmap.PAGESIZE)
        with open_file(path) as descriptor, memoryview(buffer) as view:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or the kernel reads ahead into the other half
            for start in range(0, size, 2 * block):
                position, end = start, min(start + block, size)
                while position < end:
                    position += read_at(descriptor, view[: end - position], position, path)


def set_state(paths: Sequence[Path], state: CacheState) -> CacheReport:
    """Bring `paths` into `state` as far as the system lets us; whether it worked, `verify_state` tells.

    Raises:
        NotRunnableError: `warm_pages` was asked, and the files are larger than the memory that can be had.
        CheckpointError: a file cannot be read.
    """
    started = time.monotonic()
    before = resident_share(paths)
    if state is CacheState.cold and before != 0:
        drop_pages(paths)
    if state is CacheState.half:
        halve_pages(paths)
    if state is CacheState.warm and before != 1:
        _check_memory(paths)
        for _ in range(_READS):  # the system may take some pages back while the others are being read
            warm_pages(paths)
            if resident_share(paths) > WARM_ABOVE:
                break
    after = before if state is CacheState.as_is else resident_share(paths)
    return CacheReport(state, before, after, time.monotonic() - started)


def verify_state(paths: Sequence[Path], state: CacheState) -> tuple[float, bool, str | None]:
    """Return the resident share, whether that is `state`, and if not, why; what cannot be known is not `state`."""
    share = resident_share(paths)
    if math.isnan(share) and state is not CacheState.as_is:
        return share, False, f"cache={state.value} was asked, but whether it is so is unknown{_ONLY_OWNERS}"
    if state is CacheState.cold and share >= COLD_BELOW:
        return share, False, f"cache=cold was asked, but {_percent(share)} of the checkpoint is in memory{_why(paths)}"
    if state is CacheState.warm and share <= WARM_ABOVE:
        reason = f"cache=warm was asked, but only {_percent(share)} of the checkpoint is in memory"
        return share, False, f"{reason}: the system took it back. Free memory, or use cache=as_is"
    if state is CacheState.half and abs(share - 0.5) > HALF_WITHIN:
        return share, False, f"cache=half was asked, but {_percent(share)} of the checkpoint is in memory{_why(paths)}"
    return share, True, None


def why_untold(paths: Sequence[Path]) -> str | None:
    """Return why nobody tells which pages of `paths` are in memory; None where that is told."""
    others = next((path for path in paths if not may_ask(path)), None)
    return None if others is None else f"which pages of {others} are in memory is unknown{_ONLY_OWNERS}"


def why_never_cold(folder: Path) -> str | None:
    """Return why files in `folder` cannot be brought out of the page cache, or cannot be seen to be out of it.

    It is tried on a small file of our own there. None is returned where it works, and where no file can be made.
    """
    kind = filesystem_type(folder)
    if kind in _IN_MEMORY:
        return f"{folder} lies on {kind}, which is memory and never cold. Put it on a disk (LADEZEIT_CACHE)"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ladezeit-probe-", buffering=0) as probe:
            probe.write(os.urandom(_PROBE_BYTES))
            drop_pages([Path(probe.name)])
            # What only in part is out may be next time: a busy system has reasons of its own to keep pages.
            if resident_bytes(Path(probe.name)) < WARM_ABOVE * _PROBE_BYTES:
                return None
    except OSError:
        return None
    except CheckpointError as untold:
        return f"{untold}, so that no load here is known to be cold. Use cache=as_is"
    return (
        f"the system (kernel {os.uname().release}) keeps files of {folder} ({kind}) in memory although it was asked to "
        f"let go of them, or says so of all files, as sandboxes such as gVisor do. Use cache=warm or cache=as_is"
    )


def _check_memory(paths: Sequence[Path]) -> None:
    from ladezeit.system.limits import available_memory_bytes

    needed, available = sum(_size(path) for path in paths), available_memory_bytes()
    if needed > available:
        raise NotRunnableError(
            f"cache=warm needs the whole checkpoint in memory: {needed / 2**30:.2f} GiB, and "
            f"{available / 2**30:.2f} GiB are available. Use cache=cold or cache=as_is, or a smaller model"
        )


def _read_span(path: Path, start: int, buffers: threading.local) -> None:
    if not hasattr(buffers, "one"):
        buffers.one = mmap.mmap(-1, _READ_BYTES)
    with open_file(path) as descriptor:
        position, end = start, min(start + _WINDOW_BYTES, os.fstat(descriptor).st_size)
        while position < end:
            position += read_at(descriptor, buffers.one, position, path)


def read_at(descriptor: int, buffer: mmap.mmap | memoryview, position: int, path: Path) -> int:
    """Read into `buffer` from `position` on and return how many bytes; raises `CheckpointError`, at the end too."""
    try:
        count = os.preadv(descriptor, [buffer], position)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}") from cause
    if count == 0:
        raise CheckpointError(f"{path} became shorter while it was read")
    return count


def _why(paths: Sequence[Path]) -> str:
    kinds = {filesystem_type(path) for path in paths}
    if kinds & set(_IN_MEMORY):
        kind = min(kinds & set(_IN_MEMORY))
        return f": it lies on {kind}, which is memory and never cold. Put it on a disk (LADEZEIT_CACHE)"
    return ": another process has it mapped, or the file system keeps it. End what uses it, or use cache=as_is"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as cause:
        raise _unusable(path, cause) from cause


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _unusable(path: Path, cause: OSError) -> CheckpointError:
    what = "is missing" if cause.errno == errno.ENOENT else f"cannot be opened: {cause.strerror}"
    return CheckpointError(f"{path} {what}. Fetch or make the checkpoint again")


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    """Open a file of a checkpoint to be read; raises `CheckpointError` where it cannot be."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise _unusable(path, cause) from cause
    try:
        yield descriptor
    finally:
        os.close(descriptor)
