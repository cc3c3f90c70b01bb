"""What a manager tells while it works: one typed event for each thing that happened, with when it did.

Times are nanoseconds since 1970 (`time.time_ns`), taken when the thing happened and not when it was told.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladezeit.config import LoadConfig
from ladezeit.results.records import Phase
from ladezeit.serving.protocols import Bytes, in_words

if TYPE_CHECKING:
    from ladezeit.validation.verification import Verification


_NAME = "ladezeit"


@dataclass(frozen=True)
class Event:
    """What all events have: the model's name and when it happened."""

    model: str
    at_ns: int


@dataclass(frozen=True)
class LoadStarted(Event):
    """A load begins; `needs` are the bytes that the checkpoint's headers promise."""

    needs: Bytes


@dataclass(frozen=True)
class PhaseFinished(Event):
    """A phase of a load that is over, from `start_ns` to `at_ns`; told once its load has ended well."""

    phase: Phase
    start_ns: int


@dataclass(frozen=True)
class Verified(Event):
    """What was looked at after a load, what that says and what it cost."""

    level: str
    passed: bool
    reason: str
    cost_s: float


@dataclass(frozen=True)
class LoadRecord:
    """What a load was asked to be and what it came to, without the model: enough for a result file."""

    config: LoadConfig
    folder: Path
    weight_bytes: int
    file_bytes: int
    effective: dict[str, Any]
    verification: "Verification"


@dataclass(frozen=True)
class LoadFinished(Event):
    """A model is loaded and can be used; `start_ns` is when its load began. A loader of your own has no `record`."""

    start_ns: int
    seconds: float
    method: str
    holds: Bytes
    phases: tuple[Phase, ...]
    record: LoadRecord | None = None


@dataclass(frozen=True)
class LoadFailed(Event):
    """A load ended without a model; all who waited for it were told the same `error`."""

    start_ns: int
    seconds: float
    error: Exception


class Why(Enum):
    """Why a model was unloaded."""

    asked = "asked"
    evicted = "evicted"
    swapped = "swapped"


@dataclass(frozen=True)
class Unloaded(Event):
    """A model is gone from the manager, `start_ns` to `at_ns`.

    `freed` is what the process gave back to the machine meanwhile; `still_held`: somebody has its tensors yet.
    """

    start_ns: int
    why: Why
    held: Bytes
    freed: Bytes
    still_held: bool


Listener = Callable[[Event], None]


# What a manager does, told to whoever asked: listeners, Python's logging, and OpenTelemetry where it is installed.


log = logging.getLogger("ladezeit")


class Telemetry:
    """Tells each event to the log, to OpenTelemetry, and to every listener in turn."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = [log_event, trace_event, *listeners]

    def emit_event(self, event: Event) -> None:
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


def log_event(event: Event) -> None:
    """Write the event as one line to the logger ``ladezeit``."""
    match event:
        case LoadStarted():
            log.info("loading %s: needs %s", event.model, event.needs)
        case Verified() if event.passed:
            log.info("verified %s (%s, %.3f s): %s", event.model, event.level, event.cost_s, event.reason)
        case Verified():
            log.warning("%s is not verified (%s): %s", event.model, event.level, event.reason)
        case LoadFinished():
            log.info("loaded %s by %s in %.3f s: %s", event.model, event.method, event.seconds, event.holds)
        case LoadFailed():
            log.error("%s was not loaded, after %.3f s: %s", event.model, event.seconds, event.error)
        case Unloaded():
            left = (
                "something still holds it" if event.still_held else f"{in_words(event.freed.host)} of host memory back"
            )
            log.info("unloaded %s (%s): held %s, %s", event.model, event.why.value, event.held, left)


def now_ns() -> int:
    """Return the time of an event: nanoseconds since 1970."""
    return time.time_ns()


# Loads as OpenTelemetry spans: the load below the span of whoever asked for it, its phases below the load.


def trace_event(event: Event) -> None:
    """Write the event as a span, or nothing where OpenTelemetry is not installed; see `ladezeit.serving.events`."""
    if not isinstance(event, LoadFinished | LoadFailed | Unloaded) or find_spec("opentelemetry") is None:
        return
    from opentelemetry import trace

    tracer = trace.get_tracer(_NAME)
    if isinstance(event, Unloaded):
        _unload(tracer, event)
    else:
        _load(tracer, event)


def _load(tracer: Any, event: LoadFinished | LoadFailed) -> None:
    from opentelemetry.trace import Status, StatusCode, set_span_in_context

    span = tracer.start_span(
        f"load {event.model}", start_time=event.start_ns, attributes={"ladezeit.model": event.model}
    )
    if isinstance(event, LoadFailed):
        span.record_exception(event.error, timestamp=event.at_ns)
        span.set_status(Status(StatusCode.ERROR, str(event.error)))
    else:
        span.set_attribute("ladezeit.method", event.method)
        span.set_attribute("ladezeit.gpu_bytes", event.holds.gpu)
        span.set_attribute("ladezeit.host_bytes", event.holds.host)
        _phases(tracer, event.phases, event.start_ns, set_span_in_context(span))
    span.end(event.at_ns)


def _phases(tracer: Any, phases: Sequence[Phase], origin_ns: int, below: Any) -> None:
    """Write one span a phase, with its own start and end; one that lies inside another is its child."""
    from opentelemetry.trace import set_span_in_context

    open_phases: list[tuple[float, Any, Any]] = []  # end in seconds, span, context
    for phase in sorted(phases, key=lambda phase: (phase.start_s, -phase.duration_s)):
        end_s = phase.start_s + phase.duration_s
        while open_phases and open_phases[-1][0] <= phase.start_s:
            _end(open_phases.pop(), origin_ns)
        above = open_phases[-1][2] if open_phases else below
        span = tracer.start_span(phase.path, context=above, start_time=origin_ns + round(phase.start_s * 1e9))
        open_phases.append((end_s, span, set_span_in_context(span)))
    while open_phases:
        _end(open_phases.pop(), origin_ns)


def _end(opened: tuple[float, Any, Any], origin_ns: int) -> None:
    end_s, span, _ = opened
    span.end(origin_ns + round(end_s * 1e9))


def _unload(tracer: Any, event: Unloaded) -> None:
    attributes = {
        "ladezeit.model": event.model,
        "ladezeit.why": event.why.value,
        "ladezeit.freed_gpu_bytes": event.freed.gpu,
        "ladezeit.freed_host_bytes": event.freed.host,
        "ladezeit.still_held": event.still_held,
    }
    tracer.start_span(f"unload {event.model}", start_time=event.start_ns, attributes=attributes).end(event.at_ns)
