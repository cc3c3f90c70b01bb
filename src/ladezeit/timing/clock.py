"""The clock of a sample: phases as ``with clock.span("load/read")`` that add up to the wall time.

A span costs two readings of the monotonic clock and, on a GPU, one synchronization at its end; nothing in it blocks or
allocates device memory. Spans nest by time, not by name: the one opened inside another is its child. They are those of
the thread that made the clock: what others do meanwhile is no phase of its own.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from ladezeit.errors import ConfigError
from ladezeit.results.records import Phase

#: The phase whose duration is ``load/total_s``; its own time is what no phase inside it explains.
LOAD = "load"
FIRST_TOKEN = "inference/first_token"

_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class _Open:
    path: str
    start_ns: int
    children_ns: int = 0


class Clock:
    """Collects phases, in seconds since `origin_ns` on the system's monotonic clock (shared by all processes).

    Args:
        origin_ns: the zero of all starts: when the sample's process was asked for.
        synchronise: waits until the device has done what the span of the given path gave it; called at its end.
        notify: told the path of each span that opens, for live progress; must return at once.
        detail: whether phases inside ``load`` are looked at; without, the load is one span and nothing observes it.
    """

    def __init__(
        self,
        origin_ns: int,
        synchronize: Callable[[str], None] = lambda path: None,
        notify: Callable[[str], None] = lambda path: None,
        detail: bool = True,
    ) -> None:
        self.origin_ns = origin_ns
        self.detail = detail
        self.synchronize = synchronize
        self.phases: list[Phase] = []
        self._notify = notify
        self._open: list[_Open] = []
        self._merged: dict[str, int] = {}
        self._thread = threading.get_ident()

    @contextmanager
    def span(self, path: str) -> Iterator[None]:
        """Time the block as the phase `path`; an error inside still closes the phase before it goes on."""
        if not self._sees(path):
            yield
            return
        self._notify(path)
        entry = _Open(path, time.monotonic_ns())
        self._open.append(entry)
        try:
            yield
            self.synchronize(path)
        finally:
            self._close(entry, time.monotonic_ns())

    def begin_step(self, path: str) -> bool:
        """Open a phase that may come thousands of times; all its times become one phase, which starts with the first.

        Returns:
            False where nothing was opened: in another thread, inside itself, or inside a load that is not looked into.
            Only after True comes `end_step`.
        """
        if not self._sees(path) or any(entry.path == path for entry in self._open):
            return False
        if path not in self._merged:
            self._notify(path)
        self._open.append(_Open(path, time.monotonic_ns()))
        return True

    def end_step(self) -> None:
        """Close what `begin_step` opened last."""
        self._close(self._open[-1], time.monotonic_ns(), merged=True)

    def give_back(self, path: str) -> None:
        """Take a step's phase away again: its own time becomes that of the phase that is open now."""
        index = self._merged.pop(path)
        self._open[-1].children_ns -= round(self.phases.pop(index).self_s * 1e9)
        self._merged = {other: at - (at > index) for other, at in self._merged.items()}

    def record_phase(self, path: str, start_ns: int, end_ns: int) -> None:
        """Add a phase that was timed elsewhere (before this clock existed); no span may be open."""
        assert not self._open, f"'{path}' was recorded inside '{self._open[-1].path}'"
        self._close(_Open(path, start_ns), end_ns)

    def since_origin_s(self) -> float:
        """Return the seconds from the origin until now."""
        return (time.monotonic_ns() - self.origin_ns) / 1e9

    def duration_s(self, path: str) -> float:
        """Return the seconds spent in all phases named `path`; 0.0 where there is none."""
        return sum(phase.duration_s for phase in self.phases if phase.path == path)

    def _sees(self, path: str) -> bool:
        return self._thread == threading.get_ident() and (self.detail or not path.startswith(LOAD + "/"))

    def _close(self, entry: _Open, end_ns: int, merged: bool = False) -> None:
        duration_ns = end_ns - entry.start_ns
        if entry in self._open:
            self._open.remove(entry)
        if self._open:
            self._open[-1].children_ns += duration_ns
        phase = Phase(
            path=entry.path,
            start_s=round((entry.start_ns - self.origin_ns) / 1e9, 9),
            duration_s=round(duration_ns / 1e9, 9),
            self_s=round((duration_ns - entry.children_ns) / 1e9, 9),
        )
        if not merged:
            self.phases.append(phase)
        elif entry.path not in self._merged:
            self._merged[entry.path] = len(self.phases)
            self.phases.append(phase)
        else:
            index = self._merged[entry.path]
            self.phases[index] = _added(self.phases[index], phase)


def _added(first: Phase, later: Phase) -> Phase:
    return Phase(
        first.path,
        first.start_s,
        round(first.duration_s + later.duration_s, 9),
        round(first.self_s + later.self_s, 9),
    )


# Phases that a user's own code marks: ``with ladezeit.phase("validation"):``, free where nothing measures.


_clock: "Clock | None" = None


def phase(name: str) -> AbstractContextManager[None]:
    """Time the block as the phase ``load/<name>`` while a load is traced; do nothing otherwise.

    Raises:
        ConfigError: while a load is traced: `name` is empty, or starts or ends with a slash.
    """
    if _clock is None:
        return _NOTHING
    if not name or name != name.strip("/"):
        raise ConfigError(f"ladezeit.phase({name!r}): give the phase a name, without a slash at its ends")
    return _clock.span(f"load/{name}")


@contextmanager
def enable_phases(clock: "Clock") -> Iterator[None]:
    """Let marks count on `clock` for the time of the block."""
    global _clock
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
