"""Runs many reads at once and stops them all at the first error."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ladezeit.errors import LoadError
from ladezeit.loading.base import Progress
from ladezeit.loading.streamed.plan import Extent


class _Crew:
    """The extents not yet taken, what is done, and the first error."""

    def __init__(self, extents: Sequence[Extent], progress: Progress | None) -> None:
        self._waiting = deque(extents)
        self._total = sum(extent.size for extent in extents)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self.stop = threading.Event()
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
    progress: Progress | None = None,
) -> None:
    """Read `extents` in about their order, each in one of `threads` threads; when this returns, none is left.

    Args:
        extents: what to read.
        threads: how many at once.
        reader: called once a thread with its number; returns what reads an extent, and what to call at the end.
        progress: see `Progress`; an exception in it ends the reading.

    Raises:
        LoadError: threads cannot be started, or whatever a reader raised first.
    """
    crew = _Crew(extents, progress)
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
    error, crew.error = crew.error, None
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback holds this frame, and with it the memory that was read into
