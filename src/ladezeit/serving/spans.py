"""Loads as OpenTelemetry spans: the load below the span of whoever asked for it, its phases below the load.

Only the API is used: which spans go where is the application's choice, and without one they go nowhere at once.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ladezeit.result import Phase
from ladezeit.serving.events import Event, LoadFailed, LoadFinished, Unloaded

_NAME = "ladezeit"


def tell_spans(event: Event) -> None:
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
