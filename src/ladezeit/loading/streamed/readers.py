"""Runs many reads at once, stops them all at the first error, and lets others do their part meanwhile."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from ladezeit.errors import LoadError
from ladezeit.loading.base import Progress
from ladezeit.loading.streamed.plan import Extent
from ladezeit.system.fork import renew_after_fork

#: How long a thread may keep the interpreter while others want it, during a load. Between two reads a thread needs it
#: for some 50 µs; with Python's 5 ms each of them waits for the thread that builds the model.
_SWITCH_S = 1e-4

_LOCK = threading.Lock()
renew_after_fork(_LOCK)
_switching_for = 0
_switched_before = 0.0


@contextmanager
def quick_switching() -> Iterator[None]:
    """Have Python's threads take turns more often in the block; as before when the last of several has left it."""
    global _switching_for, _switched_before
    with _LOCK:
        if _switching_for == 0:
            _switched_before = sys.getswitchinterval()
            sys.setswitchinterval(min(_SWITCH_S, _switched_before))
        _switching_for += 1
    try:
        yield
    finally:
        with _LOCK:
            _switching_for -= 1
            if _switching_for == 0:
                sys.setswitchinterval(_switched_before)


class _Background:
    """Does behind a load what its result does not wait for."""

    def __init__(self) -> None:
        self._under_way: list[threading.Event] = []

    def run_thread(self, call: Callable[[], None]) -> None:
        """Call in a thread of its own; the end of the process waits for it."""
        done = threading.Event()

        def work() -> None:
            try:
                call()
            finally:
                done.set()

        self._under_way.append(done)
        try:
            threading.Thread(target=work, name="streamed-behind", daemon=False).start()
        except RuntimeError:  # no more threads to be had, or the process ends
            work()

    def join(self) -> None:
        """Wait for all that was begun."""
        while self._under_way:
            done = self._under_way[0]
            done.wait()
            with suppress(ValueError):  # another thread waited for it as well
                self._under_way.remove(done)

    def forget_all(self) -> None:
        """Wait for nothing that was begun so far."""
        self._under_way.clear()


in_background = _Background()
os.register_at_fork(after_in_child=in_background.forget_all)  # whose threads do not exist there


class ExtentQueue:
    """What is to be read, for threads that may be there before it is known."""

    def __init__(self) -> None:
        self._waiting: deque[Extent] = deque()
        self._known = threading.Event()
        self.total_bytes = 0
        #: When it became known what to read, on the monotonic clock; when the queue was made, before that.
        self.began = time.monotonic()
        self.stopped = False

    def put_extents(self, extents: Sequence[Extent]) -> None:
        """Say what is to be read, in order; called once."""
        self._waiting.extend(extents)
        self.total_bytes = sum(extent.size for extent in extents)
        self.began = time.monotonic()
        self._known.set()

    def stop(self) -> None:
        """Let nothing more be taken."""
        self.stopped = True
        self._known.set()

    def wait(self) -> bool:
        """Wait until it is known what to read, and return whether anything of it may be taken."""
        self._known.wait()
        return not self.stopped

    def take_extent(self) -> Extent | None:
        """Return the next extent, waiting until it is known; None where none is left, or after `stop`."""
        self._known.wait()
        try:
            return None if self.stopped else self._waiting.popleft()
        except IndexError:
            return None


class Reader(Protocol):
    """What one thread does; used by that thread alone."""

    def begin_reading(self) -> None:
        """Make ready what can be before it is known what to read."""
        ...

    def read_extent(self, extent: Extent) -> None:
        """Bring one extent to its place."""
        ...

    def finish_reading(self) -> None:
        """Wait for what is still under way and let go of the thread's memory; called after an error too."""
        ...


class _Crew:
    """The threads of one load: what is done, and the first error."""

    def __init__(self, queue: ExtentQueue, progress: Progress | None) -> None:
        self._queue = queue
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()
        self.error: BaseException | None = None

    def run_reader(self, reader: Reader) -> None:
        try:
            reader.begin_reading()
            while (extent := self._queue.take_extent()) is not None:
                reader.read_extent(extent)
                self._report(extent.size)
        except BaseException as error:  # whatever it is, it is raised in the thread that waits
            self.record_failure(error)
        finally:
            try:
                reader.finish_reading()
            except BaseException as error:
                self.record_failure(error)

    def record_failure(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        self._queue.stop()

    def _report(self, size: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += size
                self._progress(self._done, self._queue.total_bytes, time.monotonic() - self._queue.began)


def run_readers(queue: ExtentQueue, readers: Iterable[Reader], progress: Progress | None = None) -> None:
    """Read what is in `queue` in about its order, by a thread for each of `readers`; when this returns, none is left.

    Args:
        queue: what to read; the reading ends before its end once it is stopped.
        readers: made in the calling thread, one after the other, while those before are at work.
        progress: see `Progress`; an exception in it ends the reading.

    Raises:
        LoadError: threads cannot be started, or whatever a reader raised first.
    """
    crew = _Crew(queue, progress)
    started: list[threading.Thread] = []
    try:
        for number, reader in enumerate(readers):
            thread = threading.Thread(target=crew.run_reader, args=(reader,), name=f"streamed-{number}", daemon=True)
            thread.start()
            started.append(thread)
        for thread in started:
            thread.join()
    except RuntimeError as cause:
        raise LoadError(f"thread {len(started) + 1} cannot be started: {cause}. Lower loading.threads") from cause
    finally:  # an interrupt too must not leave threads that write into memory nobody holds
        queue.stop()
        for thread in started:
            thread.join()
    _raise_error(crew)


def _raise_error(holder: "_Crew | Reading") -> None:
    """Raise what the holder failed with, once: the traceback holds frames, and with them the memory read into."""
    error, holder.error = holder.error, None
    try:
        if error is not None:
            raise error
    finally:
        del error


class Reading:
    """A read in a thread of its own, from when it is made.

    Args:
        read: reads all that is in the queue and returns, or ends early once that is stopped.
        queue: what is read; it may be filled later.

    Raises:
        LoadError: the thread cannot be started.
    """

    def __init__(self, read: Callable[[], None], queue: ExtentQueue) -> None:
        self._read = read
        self._queue = queue
        self._lock = threading.Lock()
        # Not `Thread.join`: where Ctrl-C interrupts it, Python 3.11 and 3.12 take the thread for ended, and the next
        # join returns while it still writes (bpo-45274).
        self._ended = threading.Event()
        self._when_ended: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self._failed = False
        self.seconds = 0.0
        try:
            threading.Thread(target=self._run, name="streamed", daemon=True).start()
        except RuntimeError as cause:
            raise LoadError(f"the thread that reads cannot be started: {cause}") from cause

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called when nothing more will be read, whatever the reason; at once where that is so already."""
        with self._lock:
            self._when_ended = call
            if not self._ended.is_set():
                return
        call()

    def wait(self) -> None:
        """Return when all is read; raises what the reading failed with. `seconds` is then what it took."""
        self._ended.wait()
        _raise_error(self)
        if self._failed:  # whoever passed over the error must not take what is there for the weights
            raise LoadError("the weights were not read: see the error before this one")

    def close(self) -> None:
        """End it if it is not at its end: no thread may write into memory that nobody holds."""
        self._queue.stop()
        self._ended.wait()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # whatever it is, it is raised in the thread that waits
            self.error, self._failed = error, True
        self.seconds = time.monotonic() - self._queue.began
        with self._lock:
            call = self._when_ended
            self._ended.set()
        call()
