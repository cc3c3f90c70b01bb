"""Runs many reads at once, stops them all at the first error, and lets others do their part meanwhile."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ladezeit.errors import LoadError
from ladezeit.loading.base import Progress
from ladezeit.loading.streamed.plan import Extent


class _Crew:
    """The extents not yet taken, what is done, and the first error."""

    def __init__(self, extents: Sequence[Extent], progress: Progress | None, stop: threading.Event) -> None:
        self._waiting = deque(extents)
        self._total = sum(extent.size for extent in extents)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.stop = stop
        self.error: BaseException | None = None

    def work(self, read: Callable[[Extent], None], finish: Callable[[], None]) -> None:
        try:
            while not self.stop.is_set():
                try:
                    extent = self._waiting.popleft()
                except IndexError:
                    break
                read(extent)
                self._report(extent.size)
        except BaseException as error:  # whatever it is, it is raised in the thread that waits
            self.fail(error)
        finally:
            try:
                finish()
            except BaseException as error:
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error
        self.stop.set()

    def _report(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._progress is not None:
                self._progress(self._done, self._total, time.monotonic() - self._started)


def run(
    extents: Sequence[Extent],
    threads: int,
    reader: Callable[[int], tuple[Callable[[Extent], None], Callable[[], None]]],
    stop: threading.Event,
    progress: Progress | None = None,
) -> None:
    """Read `extents` in about their order, each in one of `threads` threads; when this returns, none is left.

    Args:
        extents: what to read.
        threads: how many at once.
        reader: called once a thread with its number; returns what reads an extent, and what to call at the end.
        stop: ends the reading before its end, once it is set.
        progress: see `Progress`; an exception in it ends the reading.

    Raises:
        LoadError: threads cannot be started, or whatever a reader raised first.
    """
    crew = _Crew(extents, progress, stop)
    started: list[threading.Thread] = []
    try:
        for number in range(min(threads, len(extents))):
            thread = threading.Thread(target=crew.work, args=reader(number), name=f"streamed-{number}", daemon=True)
            thread.start()
            started.append(thread)
        for thread in started:
            thread.join()
    except RuntimeError as cause:
        raise LoadError(f"thread {len(started) + 1} of {threads} cannot be started: {cause}. Lower threads") from cause
    finally:  # an interrupt too must not leave threads that write into memory nobody holds
        crew.stop.set()
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
        read: reads all and returns, or ends early once the event that it is given is set.
        ended: called when nothing more will be read, whatever the reason.

    Raises:
        LoadError: the thread cannot be started.
    """

    def __init__(self, read: Callable[[threading.Event], None], ended: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._read = read
        self._ended = ended
        self.error: BaseException | None = None
        self._failed = False
        self._began = time.monotonic()
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="streamed", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as cause:
            raise LoadError(f"the thread that reads cannot be started: {cause}") from cause

    def wait(self) -> None:
        """Return when all is read; raises what the reading failed with. `seconds` is then what it took."""
        self._thread.join()
        _raise_error(self)
        if self._failed:  # whoever passed over the error must not take what is there for the weights
            raise LoadError("the weights were not read: see the error before this one")

    def close(self) -> None:
        """End it if it is not at its end: no thread may write into memory that nobody holds."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read(self._stop)
        except BaseException as error:  # whatever it is, it is raised in the thread that waits
            self.error, self._failed = error, True
        self.seconds = time.monotonic() - self._began
        self._ended()
