"""What a service learns of its loads: events, log lines, OpenTelemetry spans, and results in MLflow."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ladezeit import ModelManager
from ladezeit.analysis.comparison import compare_points
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.results.reader import read_paths
from ladezeit.serving.events import (
    Event,
    LoadFailed,
    LoadFinished,
    LoadStarted,
    PhaseFinished,
    Unloaded,
    Verified,
    Why,
)
from ladezeit.serving.production_log import ProductionLog

Config = Callable[..., dict[str, Any]]


@pytest.fixture
def manager(origin_config: Config, tmp_path: Path) -> ModelManager:
    """One model that is there and one that is not."""
    return ModelManager({**origin_config("ape"), "gone": {"path": str(tmp_path / "gone")}})


def spans_of(do: Callable[[], None]) -> list[Any]:
    """Return the spans that `do` ended, in the order of their starts, as an application exports them."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    do()
    return sorted(exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))


def test_events_tell_a_load_from_its_start_to_its_end(origin_config: Config) -> None:
    events: list[Event] = []
    before_ns = time.time_ns()
    manager = ModelManager(origin_config("ape"), listeners=[events.append])
    manager.get("ape")
    manager.unload("ape")
    kinds = [type(event) for event in events]
    assert kinds[0] is LoadStarted
    assert set(kinds[1:-3]) == {PhaseFinished}
    assert kinds[-3:] == [Verified, LoadFinished, Unloaded]
    finished, unloaded = events[-2], events[-1]
    assert isinstance(finished, LoadFinished)
    assert isinstance(unloaded, Unloaded)
    assert before_ns <= finished.start_ns < finished.at_ns <= unloaded.start_ns <= unloaded.at_ns <= time.time_ns()
    assert {phase.path for phase in finished.phases} >= {"load", "validation"}
    assert unloaded.why is Why.asked


def test_a_listener_that_fails_fails_no_load(manager: ModelManager, origin_config: Config, caplog: Any) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("the metrics server is down")

    loaded = ModelManager(origin_config("ape"), listeners=[broken]).get("ape")
    assert loaded.verification.passed
    assert "a listener failed" in caplog.text


def test_the_log_says_in_a_line_what_was_loaded(manager: ModelManager, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="ladezeit")
    manager.get("ape")
    with pytest.raises(Exception, match="gone"):
        manager.get("gone")
    lines = [record.getMessage() for record in caplog.records if record.name == "ladezeit"]
    assert any(line.startswith("loaded ape by auto in ") for line in lines)
    assert any(line.startswith("verified ape (placement") for line in lines)
    assert any(line.startswith("gone was not loaded") for line in lines)


def test_a_load_is_a_span_below_the_request_with_its_phases_below_it(manager: ModelManager) -> None:
    """With the times at which things happened: a span that is made afterwards must not look like one that took none."""
    from opentelemetry import trace

    def request() -> None:
        with trace.get_tracer("service").start_as_current_span("request"):
            manager.get("ape")

    spans = {span.name: span for span in spans_of(request)}
    load, inner = spans["load ape"], spans["load"]
    assert load.parent.span_id == spans["request"].context.span_id
    assert inner.parent.span_id == load.context.span_id
    below = [span for span in spans.values() if span.parent and span.parent.span_id == inner.context.span_id]
    assert below
    assert all(span.name.startswith("load/") for span in below)
    for span in below:
        assert inner.start_time <= span.start_time <= span.end_time <= inner.end_time
    assert load.start_time <= inner.start_time < inner.end_time <= load.end_time
    assert inner.end_time - inner.start_time > 0
    assert load.attributes["ladezeit.method"] == "auto"


def test_a_failed_load_is_a_failed_span(manager: ModelManager) -> None:
    def request() -> None:
        with pytest.raises(Exception, match="gone"):
            manager.get("gone")

    (span,) = spans_of(request)
    assert span.name == "load gone"
    assert not span.status.is_ok
    assert [event.name for event in span.events] == ["exception"]


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory, known: Any, with_store: Callable[[Path], Path]) -> Path:
    """Two loads in production, written to files and to MLflow."""
    outputs = with_store(tmp_path_factory.mktemp("outputs"))
    log = ProductionLog(outputs)
    config = {"ape": {"path": str(known["ape"].folder), "loading": {"device_map": "cpu"}}}
    with ModelManager(config, listeners=[log]) as manager:
        manager.get("ape")
        manager.unload("ape")
        manager.get("ape")
    return outputs


def test_loads_in_production_are_results_that_are_shown_and_never_ranked(production: Path) -> None:
    """`ladezeit-results compare` shows them beside a sweep, apart, with the reason."""
    samples = read_paths([production])
    assert len(samples.results) == 2
    assert all(result.metrics["load/total_s"] > 0 for result in samples.results)
    (section,) = compare_points(samples.results, ["loading"]).sections
    assert section.conditions["process"] == "production"
    assert section.ranked == []
    (point,) = section.unranked
    assert point.excluded is not None
    assert point.excluded.startswith("loaded in production")


def test_loads_in_production_are_runs_of_mlflow(production: Path) -> None:
    from ladezeit.tracking.store import open_sqlite

    store = open_sqlite(production, "ladezeit", None)
    runs = store.client.search_runs([store.experiment_id])
    assert len(runs) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["load/total_s"] > 0 for run in runs)
    assert {run.data.tags["config.process.kind"] for run in runs} == {"production"}


def test_a_store_that_is_gone_fails_no_load_and_the_file_is_there(tmp_path: Path, origin_config: Config) -> None:
    """Tracking is a comfort: a dead server costs a log line, and what it missed can be imported later."""
    dead = TrackingConfig(kind=TrackingKind.server, uri="http://127.0.0.1:9")
    log = ProductionLog(tmp_path, dead)
    with ModelManager(origin_config("ape"), listeners=[log]) as manager:
        assert manager.get("ape").verification.passed
    assert len(list((tmp_path / "production").glob("*/result.json"))) == 1
    assert not list((tmp_path / "production").glob("*/.mlflow_run_id"))


def test_a_failed_load_is_an_event_with_its_error(tmp_path: Path) -> None:
    events: list[Event] = []
    manager = ModelManager({"gone": {"path": str(tmp_path / "gone")}}, listeners=[events.append])
    with pytest.raises(Exception, match="gone") as raised:
        manager.get("gone")
    (event,) = events
    assert isinstance(event, LoadFailed)
    assert event.error is raised.value
