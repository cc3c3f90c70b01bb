"""The ring to a GPU without Python: what `_native_readers.c` does, for loads whose bytes only have to be copied.

It is built when ladezeit is installed and a C compiler is there; where it is not, and where elements are cast on the
device, `device.PinnedRing` does the same with Python's threads.
"""

import ctypes
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.errors import LoadError, OutOfMemoryError
from ladezeit.loading.base import Progress
from ladezeit.loading.streamed.layout import Segment
from ladezeit.loading.streamed.memory import ShardFile
from ladezeit.loading.streamed.plan import ReadMethod
from ladezeit.loading.streamed.readers import ExtentQueue, in_background
from ladezeit.loading.streamed.readiness import ReadTracker

if TYPE_CHECKING:
    from torch import Tensor

_EXTENSION = "ladezeit.loading.streamed._native_readers"
#: So long a call may keep a thread from Python's signal handlers, and progress from being reported.
_PATIENCE_MS = 50

#: Functions of the CUDA runtime, in the order of `_native_readers.c`'s table; it ends with `read` (None: the system's).
RUNTIME_FUNCTIONS = (
    "cudaSetDevice",
    "cudaHostRegister",
    "cudaHostUnregister",
    "cudaHostAlloc",
    "cudaFreeHost",
    "cudaEventCreateWithFlags",
    "cudaEventDestroy",
    "cudaMemcpyAsync",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaGetLastError",
)

_HOW = {ReadMethod.buffered: 0, ReadMethod.direct: 1, ReadMethod.by_residency: 2}
_EXTENT = np.dtype(
    [("begin", "i8"), ("end", "i8"), *((name, "i4") for name in ("number", "file", "how", "copies", "copies_end", "_"))]
)
_PIECE = np.dtype([("target", "u8"), ("source", "u4"), ("size", "u4")])


class _Shard(ctypes.Structure):
    _fields_ = [
        ("buffered", ctypes.c_int32),
        ("direct", ctypes.c_int32),
        ("refused", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("refused_at", ctypes.c_int64),
        ("read_buffered", ctypes.c_int64),
        ("read_direct", ctypes.c_int64),
    ]


class _Failure(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("file", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("offset", ctypes.c_int64),
    ]


#: What `_native_readers.c` calls its version: a library left over from another one must not be given these lists.
_VERSION = 1
#: cudaErrorMemoryAllocation.
_CUDA_OUT_OF_MEMORY = 2
_READ_FAILED, _FILE_SHORTER, _RUNTIME_FAILED, _NO_MEMORY = 1, 2, 3, 4


@dataclass(frozen=True)
class Runtime:
    """The functions that copy to one device.

    Attributes:
        functions: addresses in the order of `RUNTIME_FUNCTIONS`, and of a `pread` of its own, or 0.
        device: the device's number.
        stream: handle of the stream that copies are queued on.
        near: processors to run on; empty where that makes no difference.
        describe: says what an error code of these functions means.
    """

    functions: tuple[int, ...]
    device: int
    stream: int
    near: frozenset[int]
    describe: Callable[[int], str]


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(_EXTENSION)
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        number = ctypes.c_int
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "start": (pointer, [pointer, number, size, number, pointer, pointer, number]),
            "give": (None, [pointer, pointer, number, pointer, pointer, pointer]),
            "stop": (None, [pointer]),
            "wait": (number, [pointer, number, number, number]),
            "join": (number, [pointer, number]),
            "done_bytes": (ctypes.c_int64, [pointer]),
            "pinned_bytes": (ctypes.c_int64, [pointer]),
            "error": (_Failure, [pointer]),
            "free": (None, [pointer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, f"ladezeit_readers_{name}")
            function.restype, function.argtypes = result, arguments
        if ctypes.c_int32.in_dll(library, "ladezeit_readers_version").value != _VERSION:
            return None
    except (OSError, AttributeError, ValueError):  # built for another machine, or of another version
        return None
    return library


def is_built() -> bool:
    """Say whether this installation has them."""
    return _library() is not None


@cache
def cuda_functions() -> tuple[int, ...] | None:
    """Return the addresses of `RUNTIME_FUNCTIONS` in the CUDA runtime that torch has loaded; None where there is none.

    torch need not show its symbols to others: the file is found among those that are mapped.
    """
    found = re.search(r"^\S+ \S+ \S+ \S+ \S+\s+(/.*/libcudart\.so[^\n]*)$", Path("/proc/self/maps").read_text(), re.M)
    if found is None:
        return None
    try:
        library = ctypes.CDLL(found[1])
        addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in RUNTIME_FUNCTIONS]
    except (OSError, AttributeError):
        return None
    return (*addresses, 0)


class NativeReaders:
    """The threads of one load; they pin their first slots at once.

    Args:
        runtime: what copies.
        threads: how many.
        slot_bytes: of one slot, two of which each thread has; a multiple of a page.

    Raises:
        LoadError: no thread can be started.
    """

    def __init__(self, runtime: Runtime, threads: int, slot_bytes: int) -> None:
        library = _library()
        assert library is not None
        self._library, self._runtime = library, runtime
        self._keep: list[Any] = []
        self._files: list[ShardFile] = []
        self._shards: Any = None
        self._lock = threading.Lock()
        functions = (ctypes.c_void_p * len(runtime.functions))(*runtime.functions)
        near = (ctypes.c_int32 * len(runtime.near))(*sorted(runtime.near))
        in_background.join()  # two rings would be twice the pinned memory that was asked for
        self._handle = library.ladezeit_readers_start(
            functions, threads, slot_bytes, runtime.device, runtime.stream, near, len(near)
        )
        if not self._handle:
            raise LoadError("no thread that reads can be started: the system allows this process no more of them")
        self.pinned_bytes = 0

    def wait_until_read(self, queue: ExtentQueue, progress: Progress | None) -> None:
        """Wait until all that `give` gave has arrived, or the queue is stopped; then begin to give the memory back.

        Raises:
            LoadError: what the threads failed with first.
        """
        call, handle = self._library, self._handle
        try:
            while not call.ladezeit_readers_join(handle, _PATIENCE_MS):
                if queue.stopped:
                    call.ladezeit_readers_stop(handle)
                elif progress is not None and queue.total_bytes:
                    progress(
                        call.ladezeit_readers_done_bytes(handle), queue.total_bytes, time.monotonic() - queue.began
                    )
            if progress is not None and queue.total_bytes and not queue.stopped:
                progress(call.ladezeit_readers_done_bytes(handle), queue.total_bytes, time.monotonic() - queue.began)
        finally:
            call.ladezeit_readers_stop(handle)
            while not call.ladezeit_readers_join(handle, _PATIENCE_MS):
                pass
            error = call.ladezeit_readers_error(handle)
            self.pinned_bytes = call.ladezeit_readers_pinned_bytes(handle)
            self._note_reads()
            with self._lock:
                self._handle = None
            in_background.run_thread(lambda: call.ladezeit_readers_free(handle))
        if error.kind:
            by_system = error.kind in (_READ_FAILED, _NO_MEMORY)
            raise self._failed(error) from (OSError(error.code, os.strerror(error.code)) if by_system else None)

    def submit_reads(
        self,
        tracker: ReadTracker,
        files: list[ShardFile],
        pieces: dict[int, list[Segment]],
        memory: "dict[int, tuple[int, Tensor]]",
        arenas: "dict[int, Tensor]",
    ) -> None:
        """Say what to read, and where it goes.

        Args:
            tracker: of the load, which this marks from now on.
            files: all shards, open as long as the load goes on.
            pieces: of those shards that are read in pieces.
            memory: for other shards the byte of the file and the device's memory where it begins.
            arenas: the device's memory for pieces.
        """
        extents, copies = _lists(tracker, pieces, memory, arenas)
        self._files = files
        self._shards = (_Shard * len(files))()
        for shard, file in zip(self._shards, files, strict=True):
            direct = file.direct_descriptor()
            shard.buffered, shard.direct = file.descriptor, -1 if direct is None else direct
        flags = (ctypes.c_uint8 * len(tracker.flags)).from_buffer(tracker.flags)
        self._keep = [extents, copies, flags]
        tracker.wait_by(self._wait)
        self._library.ladezeit_readers_give(
            self._handle, extents.ctypes.data, len(extents), copies.ctypes.data, self._shards, flags
        )

    def _wait(self, begin: int, end: int) -> bool:
        """Wait for extents `begin` to `end` of the file's order; return False where they will not come."""
        while True:
            with self._lock:  # `wait_until_read` gives them back
                if self._handle is None:
                    return False
                found = self._library.ladezeit_readers_wait(self._handle, begin, end, _PATIENCE_MS)
            if found >= 0:
                return bool(found)

    def _note_reads(self) -> None:
        for shard, file in zip(self._shards or (), self._files, strict=True):
            file.read_bytes[ReadMethod.buffered] += shard.read_buffered
            file.read_bytes[ReadMethod.direct] += shard.read_direct
            if shard.refused and file.direct_refused is None:
                file.direct_refused = f"{os.strerror(shard.refused)} at offset {shard.refused_at}"

    def _failed(self, error: Any) -> LoadError:
        if error.kind == _READ_FAILED:
            return self._files[int(error.file)].read_error(error.offset, os.strerror(error.code))
        if error.kind == _FILE_SHORTER:
            return self._files[int(error.file)].read_error(error.offset, "the file became shorter")
        if error.kind == _NO_MEMORY:
            return OutOfMemoryError(f"there is no memory to read into ({os.strerror(error.code)})")
        if error.code == _CUDA_OUT_OF_MEMORY:
            return OutOfMemoryError(f"the device has no memory left to copy with: {self._runtime.describe(error.code)}")
        return LoadError(f"copying to the device failed: {self._runtime.describe(error.code)}")


def _lists(
    tracker: ReadTracker,
    pieces: dict[int, list[Segment]],
    memory: "dict[int, tuple[int, Tensor]]",
    arenas: "dict[int, Tensor]",
) -> tuple[Any, Any]:
    """Return the extents in the order in which they are wanted, and their copies, as `_native_readers.c` takes them."""
    extents = np.zeros(len(tracker.extents), _EXTENT)
    copies: list[Any] = []
    count = 0
    for shard, numbers in tracker.of_shards():
        own = tracker.extents[numbers.start : numbers.stop]
        view = extents[numbers.start : numbers.stop]
        view["begin"], view["end"] = [extent.begin for extent in own], [extent.end for extent in own]
        view["how"] = [_HOW[extent.how] for extent in own]
        view["file"], view["number"] = shard, np.arange(numbers.start, numbers.stop)
        if shard in pieces:
            made, first = _copies_of_pieces(view, pieces[shard], arenas)
        else:
            base, whole = memory[shard]
            made, first = np.zeros(len(own), _PIECE), np.arange(len(own) + 1)
            made["target"] = whole.data_ptr() + (view["begin"] - base).astype(np.uint64)
            made["size"] = view["end"] - view["begin"]
        view["copies"], view["copies_end"] = count + first[:-1], count + first[1:]
        copies.append(made)
        count += len(made)
    return extents[tracker.order], np.concatenate(copies) if copies else np.zeros(1, _PIECE)


def _copies_of_pieces(view: Any, pieces: Sequence[Segment], arenas: "dict[int, Tensor]") -> tuple[Any, Any]:
    """Return the copies of a shard's pieces, cut where its extents end, and which copy each extent's begin with."""
    base = {arena: bytes_.data_ptr() for arena, bytes_ in arenas.items()}
    begins = np.array([piece.begin for piece in pieces], np.int64)
    ends = np.array([piece.end for piece in pieces], np.int64)
    places = np.array([base[piece.arena] + piece.offset for piece in pieces], np.uint64)
    first = np.searchsorted(view["begin"], begins, "right") - 1
    last = np.searchsorted(view["begin"], ends - 1, "right") - 1
    counts = last - first + 1
    which = np.repeat(np.arange(len(pieces)), counts)
    extent = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    begin = np.maximum(begins[which], view["begin"][extent])
    made = np.zeros(len(which), _PIECE)
    made["target"] = places[which] + (begin - begins[which]).astype(np.uint64)
    made["source"] = begin - view["begin"][extent]
    made["size"] = np.minimum(ends[which], view["end"][extent]) - begin
    return made, np.searchsorted(extent, np.arange(len(view) + 1))
