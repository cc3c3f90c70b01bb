"""What a manager does, told to whoever asked: listeners, Python's logging, and OpenTelemetry where it is installed.

Nothing that a listener does can fail a load: what it raises is logged.
"""

import logging
import time
from collections.abc import Iterable

from ladezeit.serving.budget import in_words
from ladezeit.serving.events import Event, Listener, LoadFailed, LoadFinished, LoadStarted, Proven, Unloaded
from ladezeit.serving.spans import tell_spans

log = logging.getLogger("ladezeit")


class Telemetry:
    """Tells each event to the log, to OpenTelemetry, and to every listener in turn."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = [tell_log, tell_spans, *listeners]

    def tell(self, event: Event) -> None:
        """Tell all; in the thread that calls, and never failing it."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed at %s of %s; loading goes on", type(event).__name__, event.model)

    def close(self) -> None:
        """Have listeners that work in the background (they have a `close`) end what they began."""
        for listener in self._listeners:
            end = getattr(listener, "close", None)
            if end is not None:
                end()


def tell_log(event: Event) -> None:
    """Write the event as one line to the logger ``ladezeit``."""
    match event:
        case LoadStarted():
            log.info("loading %s: needs %s", event.model, event.needs)
        case Proven() if event.passed:
            log.info("proved %s (%s, %.3f s): %s", event.model, event.level, event.cost_s, event.reason)
        case Proven():
            log.warning("%s is not proven (%s): %s", event.model, event.level, event.reason)
        case LoadFinished():
            log.info("loaded %s by %s in %.3f s: %s", event.model, event.method, event.seconds, event.holds)
        case LoadFailed():
            log.error("%s was not loaded, after %.3f s: %s", event.model, event.seconds, event.error)
        case Unloaded():
            left = (
                "somebody still holds it" if event.still_held else f"{in_words(event.freed.host)} of host memory back"
            )
            log.info("unloaded %s (%s): held %s, %s", event.model, event.why.value, event.held, left)


def now_ns() -> int:
    """Return the time of an event: nanoseconds since 1970."""
    return time.time_ns()
