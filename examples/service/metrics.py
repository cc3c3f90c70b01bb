"""Loads as Prometheus metrics: a listener that counts events, and the state of memory when it is asked for."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ladezeit.serving.events import Event, LoadFailed, LoadFinished, Unloaded, Verified
from ladezeit.serving.manager import ManagerStatus

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class LoadMetrics:
    """Counts what a manager tells; one registry an application, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.loads = Counter("ladezeit_loads", "Loads by outcome", ["model", "outcome"], registry=self.registry)
        self.unloads = Counter("ladezeit_unloads", "Models unloaded", ["model", "why"], registry=self.registry)
        self.seconds = Histogram(
            "ladezeit_load_seconds",
            "From request to verified model",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.verification_seconds = Histogram(
            "ladezeit_verification_seconds",
            "Cost of the verification",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.bytes = Gauge("ladezeit_weights_bytes", "Memory of loaded weights", ["place"], registry=self.registry)

    def __call__(self, event: Event) -> None:
        """Count the event."""
        match event:
            case LoadFinished():
                self.loads.labels(event.model, "ok").inc()
                self.seconds.labels(event.model).observe(event.seconds)
            case LoadFailed():
                self.loads.labels(event.model, "failed").inc()
            case Verified():
                self.verification_seconds.labels(event.model).observe(event.cost_s)
            case Unloaded():
                self.unloads.labels(event.model, event.why.value).inc()

    def exposition(self, status: ManagerStatus) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self.bytes.labels("gpu").set(status.charged.gpu)
        self.bytes.labels("host").set(status.charged.host)
        return bytes(generate_latest(self.registry))
