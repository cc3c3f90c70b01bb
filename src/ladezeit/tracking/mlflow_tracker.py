"""Results as MLflow runs: one run a sample, one parent run a sweep, each written in a handful of calls."""

import getpass
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ladezeit.errors import TrackingError
from ladezeit.redaction import redact_text
from ladezeit.results.records import FILE_NAME, TIMELINE_FILE, Result, SweepRecord
from ladezeit.system.files import write_atomically
from ladezeit.tracking import projection, views
from ladezeit.tracking.owner import Owner
from ladezeit.tracking.projection import PHASES_FILE, phases_table
from ladezeit.tracking.store import Store, check_answers, check_reachable, report_errors
from ladezeit.tracking.tracker import SweepStatus, Tracker
from ladezeit.tracking.views import comparison_address

_LIBRARIES = ("ladezeit", "mlflow", "torch", "transformers", "accelerate", "safetensors")

#: Left in a sample's folder once its run is complete; holds the run's id.
MARKER = ".mlflow_run_id"

TRACE_FILE = "traceback.txt"

_TEXTS = (FILE_NAME, ".hydra/config.yaml", ".hydra/overrides.yaml", "worker.log", "generated.txt", "findings.json")
#: A profile is of use only whole.
_WHOLE_TEXTS = ("profile.html", "profile.speedscope.json")
_MOST_TEXT_BYTES = 1_000_000

_log = logging.getLogger(__name__)


class MlflowTracker(Tracker):
    """Tracks to an open store.

    MLflow's client is used, never its fluent interface: that one keeps an active run in the process and would mask an
    error with its own.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._client = store.client
        self._suspect = False
        self._view_reasons: set[str] = set()

    def begin_sweep(self, record: SweepRecord, folder: Path) -> SweepRecord:
        """See `Tracker.begin_sweep`."""
        with self.reporting(f"opening the run of sweep {record.id}"):
            parent = self.find_run(record)
            own = {**Owner.this_process().tags, projection.FOLDER_TAG: _place(folder)}
            if parent is None:
                parent = self.store.create_run(
                    start_time=projection.started_ms(record.started_at),
                    run_name=projection.truncate_text(redact_text(record.title), 200) or record.id,
                    tags={**projection.parent_tags(record, _versions()), **own, **_made()},
                )
            elif is_deleted(parent):
                raise TrackingError(f"the run of sweep {record.id} was deleted in MLflow: restore it there first")
            else:
                for key, value in own.items():
                    self._client.set_tag(parent.info.run_id, key, value)
                self._client.update_run(parent.info.run_id, status="RUNNING")
        opened = replace(record, experiment_id=self.store.experiment_id, parent_run_id=parent.info.run_id)
        opened.save_record(folder)
        self.save_view(opened)
        return opened

    def log_sample(self, result: Result, folder: Path, sweep: SweepRecord | None, varying: Sequence[str]) -> str:
        """See `Tracker.log_sample`; a run that a person deleted stays deleted."""
        if sweep is not None and sweep.parent_run_id is None:
            raise TrackingError(f"sweep {sweep.id} has no run in MLflow yet: its samples can be imported when it has")
        with self.reporting(f"logging sample {result.identity.label}"):
            run = self.find_run(result) or self._create(result, sweep, folder)
            run_id = str(run.info.run_id)
            # A run that is still open was cut off while it was written: what is missing is written now.
            if run.info.status == "RUNNING" and not is_deleted(run):
                self._fill(run_id, result, folder, sweep, varying)
        write_atomically(folder / MARKER, run_id + "\n")
        return run_id

    def find_run(self, of: Result | SweepRecord) -> Any:
        """Return the run of a sample, or a sweep's own; see `settle_duplicates`. Raises whatever MLflow raises."""
        return self.settle_duplicates(self.store.search_runs(projection.condition_of(of, "sweep"), with_deleted=True))

    def settle_duplicates(self, runs: Sequence[Any]) -> Any:
        """Return the run that stands for the sample (or sweep) that all of `runs` are of; None where there is none.

        It is the oldest. Two processes that log a sample at once make two, and so does a server behind a proxy that
        repeats a request: the others are closed and marked. One that a person deleted counts where there is no other.
        """
        kept, *others = sorted((run for run in runs if not is_deleted(run)), key=_age) or [None]
        for other in others:
            self._client.set_tag(other.info.run_id, projection.ROLE_TAG, "duplicate")
            self._explain(other.info.run_id, f"duplicate of run {kept.info.run_id}", end=True)
        return kept if kept is not None else next(iter(runs), None)

    def end_sweep(
        self,
        record: SweepRecord,
        status: SweepStatus,
        summary_markdown: str,
        artifacts: Sequence[Path] = (),
        *,
        ended_ms: int | None = None,
    ) -> None:
        """See `Tracker.end_sweep`."""
        run_id = record.parent_run_id
        if run_id is None:
            raise TrackingError(f"sweep {record.id} has no run in MLflow: nothing to close")
        with self.reporting(f"closing the run of sweep {record.id}"):
            note = f"{summary_markdown}\n\nRepeat it: `{record.command}`"
            self._client.set_tag(run_id, projection.NOTE_TAG, projection.as_note(note))
            for path in artifacts:
                if path.is_dir():
                    self._client.log_artifacts(run_id, str(path), path.name)
                else:
                    self._client.log_artifact(run_id, str(path))
            self._client.set_terminated(run_id, status.value, end_time=ended_ms)
        self.save_view(record)

    def explain_run(self, run_id: str, reason: str, *, end: bool) -> None:
        """Note why a run has no complete result; `end` closes it as KILLED, for nobody else will.

        Raises:
            TrackingError: the run could not be written.
        """
        with self.reporting(f"closing the run {run_id}"):
            self._explain(run_id, reason, end=end)

    def _explain(self, run_id: str, reason: str, *, end: bool) -> None:
        self._client.set_tag(run_id, projection.REASON_TAG, projection.truncate_text(redact_text(reason)))
        if end:
            self._client.set_tag(run_id, projection.NOTE_TAG, projection.as_note(f"**killed**: {reason}"))
            self._client.set_terminated(run_id, "KILLED")

    def set_parent(self, run_id: str, sweep: SweepRecord) -> None:
        """Put the run of a sample below its sweep's; raises whatever MLflow raises."""
        self._client.set_tag(run_id, projection.PARENT_TAG, sweep.parent_run_id)

    def comparison_lines(self, of: SweepRecord | str | None) -> str:
        """See `Tracker.address`."""
        saved: dict[str, str] = {}
        if isinstance(of, SweepRecord):
            with self.reporting("reading the experiment"):
                saved = self._client.get_experiment(self.store.experiment_id).tags
        return comparison_address(self.store, of, views_saved=saved)

    def _create(self, result: Result, sweep: SweepRecord | None, folder: Path) -> Any:
        tags = {
            **Owner.this_process().tags,
            projection.FOLDER_TAG: _place(folder),
            projection.IDENTITY_TAG: projection.identity_of(result),
            projection.ROLE_TAG: "sample",
            **_made(),
        }
        if sweep is not None and sweep.parent_run_id is not None:
            tags[projection.SWEEP_TAG] = projection.sweep_tag(sweep.id)
            tags[projection.PARENT_TAG] = sweep.parent_run_id
        return self.store.create_run(
            start_time=projection.started_ms(result.started_at),
            run_name=projection.run_name(result),
            tags=tags,
        )

    def _fill(
        self, run_id: str, result: Result, folder: Path, sweep: SweepRecord | None, varying: Sequence[str]
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        ended_ms = projection.ended_ms(result)
        with TemporaryDirectory(prefix="ladezeit-") as staging:
            files = collect_files(result, folder, Path(staging))
            note = projection.note_of(result, run_id, with_timeline=TIMELINE_FILE in files)
            tags = {**projection.tags_of(result, sweep), projection.NOTE_TAG: note}
            # A fixed time and step make a metric that is written twice the same metric.
            self._client.log_batch(
                run_id,
                metrics=[Metric(k, v, ended_ms, 0) for k, v in projection.metrics_of(result).items()],
                params=[Param(key, value) for key, value in projection.params_of(result, varying).items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            self._client.log_artifacts(run_id, staging)
        self._client.set_terminated(run_id, projection.RUN_STATUS[result.status], end_time=ended_ms)

    def save_view(self, record: SweepRecord) -> None:
        """Write the ready-made comparison into the experiment; a comfort that must not fail anything."""
        try:
            views.save_views(self.store, record)
        except Exception as cause:
            reason = redact_text(str(cause))[:200]
            if reason not in self._view_reasons:  # once, and not at the beginning and at the end
                self._view_reasons.add(reason)
                _log.warning("the saved view of sweep %s was not written: %s", record.id, reason)

    @contextmanager
    def reporting(self, doing: str) -> Iterator[None]:
        """Turn any failure inside into a quick `TrackingError`; after one, the store must show that it is back."""
        self._check_there()
        was_suspect, self._suspect = self._suspect, True
        if was_suspect:
            check_answers(self.store.uri)
        with report_errors(doing):
            yield
        self._suspect = False

    def _check_there(self) -> None:
        database = self.store.database
        if database is None:
            check_reachable(self.store.uri)
        elif not database.exists():
            # The open file would take every write and lose it.
            raise TrackingError(f"the store {database} is gone: the results on disk can be imported into a new one")


def _place(folder: Path) -> str:
    return projection.truncate_text(redact_text(str(folder.absolute())))


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "unknown"


# What a store knows already.


def is_deleted(run: Any) -> bool:
    """Say whether a person deleted the run in MLflow's interface: it is there, and nothing may be written to it."""
    return bool(run.info.lifecycle_stage == "deleted")


def newest_sweep(store: Store) -> Any:
    """Return the run of the sweep that was started last, None where there is none."""
    condition, order = f"tags.`{projection.ROLE_TAG}` = 'sweep'", ["attributes.start_time DESC"]
    return next(iter(store.client.search_runs([store.experiment_id], condition, max_results=1, order_by=order)), None)


def _age(run: Any) -> tuple[int, str, str]:
    return run.info.start_time, run.data.tags.get(projection.CREATED_TAG, ""), run.info.run_id


def _made() -> dict[str, str]:
    return {projection.CREATED_TAG: datetime.now(UTC).isoformat(), "mlflow.user": _user()}


# The files of a sample that go with its run, copied without credentials.


def collect_files(result: Result, folder: Path, staging: Path) -> set[str]:
    """Copy what there is of a sample's files into `staging` and return the names.

    Texts are copied without credentials, and only their last megabyte (a profile whole); what is missing is
    left out.
    """
    texts = {Path(name).name: folder / name for name in _TEXTS}
    for name, source in texts.items():
        if source.is_file():
            (staging / name).write_text(redact_text(_end_of(source)), encoding="utf-8")
    for name in _WHOLE_TEXTS:
        if (folder / name).is_file():
            (staging / name).write_text(redact_text((folder / name).read_text(encoding="utf-8")), encoding="utf-8")
    if (folder / TIMELINE_FILE).is_file():
        shutil.copyfile(folder / TIMELINE_FILE, staging / TIMELINE_FILE)
    if result.error is not None and result.error.trace:
        (staging / TRACE_FILE).write_text(redact_text(result.error.trace), encoding="utf-8")
    (staging / PHASES_FILE).write_text(phases_table(result.phases), encoding="utf-8")
    return {path.name for path in staging.iterdir()}


def _end_of(source: Path) -> str:
    with source.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _MOST_TEXT_BYTES))
        text = file.read().decode(errors="replace")
    return text if size <= _MOST_TEXT_BYTES else f"… (the last {_MOST_TEXT_BYTES} of {size} bytes)\n{text}"
