"""Loads in production as results and MLflow runs, written by a thread of their own.

They are no measurements: nobody set the page cache, and other work ran beside. They say ``process=production``, which
is shown beside a sweep and never ranked with it. Nothing here can fail or delay a load: what cannot be written is
logged, and what there is no room for in the queue is dropped and counted.
"""

import logging
import queue
import shlex
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ladezeit.analysis.eligibility import PRODUCTION
from ladezeit.config import CacheState, FolderModel, ModelConfig, TrackingConfig, TrackingKind, to_plain
from ladezeit.results.records import Identity, Result, Status, save_result
from ladezeit.runner.sample import load_metrics
from ladezeit.serving.events import Event, LoadFinished, LoadRecord
from ladezeit.timing.clock import Clock
from ladezeit.timing.resources import GIB

_log = logging.getLogger("ladezeit")
_MOST_WAITING = 100
_VARYING = ("model", "loading")


class ProductionLog:
    """A listener of `ModelManager` that keeps each load as ``outputs/production/<time>/result.json`` and in MLflow.

    Args:
        outputs: the folder of results; the sqlite store lies in it too.
        tracking: where runs go, as the option group `tracking`; None for ``sqlite``. ``kind=none`` writes files only.
    """

    def __init__(self, outputs: str | Path, tracking: TrackingConfig | None = None) -> None:
        self.outputs = Path(outputs).expanduser().absolute()
        self.tracking = tracking or TrackingConfig(kind=TrackingKind.sqlite)
        self.dropped = 0
        self._waiting: queue.Queue[LoadFinished | None] = queue.Queue(_MOST_WAITING)
        self._tracker: Any = None
        self._environments: dict[Path, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._write_all, name="ladezeit-production-log", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take the event; returns at once."""
        if not isinstance(event, LoadFinished) or event.record is None:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.dropped += 1
            _log.warning("the load of %s is not written: %d others wait to be", event.model, _MOST_WAITING)

    def close(self, wait_s: float = 60.0) -> None:
        """Write what waits, for at most `wait_s`, and end the thread."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(wait_s)

    def _write_all(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._write(event)
            except Exception as cause:
                _log.warning("the load of %s was not written: %s", event.model, cause)

    def _write(self, event: LoadFinished) -> None:
        assert event.record is not None
        result = result_of(event, event.record, self._environment(event.record))
        began = datetime.fromtimestamp(event.start_ns / 1e9, UTC)
        folder = self.outputs / "production" / f"{began:%Y-%m-%d_%H-%M-%S.%f}-{event.model}"
        folder.mkdir(parents=True)
        save_result(result, folder)
        if self._tracker is None:
            from ladezeit.tracking import open_tracker

            self._tracker = open_tracker(self.tracking, self.outputs)
        self._tracker.log_sample(result, folder, None, _VARYING)

    def _environment(self, record: LoadRecord) -> dict[str, Any]:
        """Return what a sweep says of its machine; asked once for each folder that models lie in."""
        if record.folder not in self._environments:
            from ladezeit.system.environment import collect_environment
            from ladezeit.system.gpus import resolve_device

            self._environments[record.folder] = collect_environment(resolve_device(record.config.device), record.folder)
        return dict(self._environments[record.folder])


def result_of(event: LoadFinished, record: LoadRecord, environment: dict[str, Any]) -> Result:
    """Return the load as a result: the same projection as a sample's, marked as what it is."""
    from ladezeit.config.serialize import point_id

    config, verification = record.config, record.verification
    plain = to_plain(config)
    words = [*_model_words(config.model), f"loading={config.loading.name}"]
    plain |= {"process": {"kind": PRODUCTION}, "cache": {"state": CacheState.as_is.name}}
    result = Result(
        status=Status.ok,
        identity=Identity(
            point=f"{PRODUCTION}-{point_id(config)}",
            sample=0,
            job=0,
            label=f"{event.model} {PRODUCTION}",
            overrides=words,
            command=shlex.join(["ladezeit", *words]),
        ),
        config=plain,
        started_at=datetime.fromtimestamp(event.start_ns / 1e9, UTC).isoformat(),
        effective=dict(record.effective),
        phases=list(event.phases),
        proof=verification.to_dict(),
        environment=environment,
    )
    clock = Clock(0)
    clock.phases = list(event.phases)
    result.metrics = load_metrics(clock, record.weight_bytes, record.file_bytes)
    result.metrics |= verification.metrics | {"validation/total_s": verification.total_s}
    result.metrics |= {"memory/weights_gib": (event.holds.gpu + event.holds.host) / GIB, "sample/wall_s": event.seconds}
    return result


def _model_words(model: ModelConfig) -> list[str]:
    """Return the words of `ladezeit`'s command line that mean the model."""
    if isinstance(model, FolderModel):
        return ["model=folder", f"model.name={model.name}", f"model.path={model.path}"]
    return [f"model={model.name}"]
