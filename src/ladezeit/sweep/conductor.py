"""Conducts a sweep: checks every point first, opens the parent run, measures in blocks, and closes whatever happens."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from ladezeit.config import RunConfig, build_config
from ladezeit.config.serialize import point_id
from ladezeit.errors import REFUSALS, ConfigError, NotRunnableError, TrackingError
from ladezeit.loading.preflight import TooLittleMemoryError
from ladezeit.redaction import redact_text
from ladezeit.report.sweep_table import as_rich
from ladezeit.report.verdict import closing_words, summarize_sweep
from ladezeit.results.fields import varying_values
from ladezeit.results.labels import make_labels
from ladezeit.results.reader import gather_results
from ladezeit.results.records import REPORT_FOLDER, SUMMARY_FILE, SWEEP_FILE_NAME, Identity, Result, SweepRecord
from ladezeit.sweep import job as one_job
from ladezeit.sweep.claim import FolderClaim
from ladezeit.sweep.plan import Job, in_blocks, varying_keys
from ladezeit.sweep.progress import Display
from ladezeit.sweep.session import Session, current_session
from ladezeit.system.environment import git_state
from ladezeit.tracking import MARKER, SweepStatus, Tracker

#: A folder as `conf/config.yaml` names it, to the microsecond.
_DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}$")
WARM_UP_FOLDER = "warm-up"
#: What the files of a report are called.
_REPORT_NAME = "report"

Compose = Callable[[list[str]], DictConfig]
Launch = Callable[[list[list[str]]], Sequence[JobReturn]]


def run_sweep(overrides: list[list[str]], compose: Compose, launch: Launch, folder: Path) -> Sequence[JobReturn]:
    """Measure all samples of a sweep into `folder`.

    Args:
        overrides: one list a job, in any order.
        compose: composes a job's overrides.
        launch: runs jobs in the order given and returns their outcomes.
        folder: the sweep's folder, empty but for Hydra's own file.

    Raises:
        ConfigError: a point cannot be composed or has no meaning; nothing was started.
        CheckpointError, NotRunnableError, OutOfMemoryError: none of the points can run here; nothing was started.
    """
    session = current_session()
    claim = FolderClaim(folder)
    try:
        jobs = plan_jobs(session, overrides, compose)
    except BaseException:
        claim.give_back()
        raise
    record = _record(jobs, folder)
    session.planned = len(jobs)
    used = {device for job in jobs if job.prepared for device in job.prepared.devices}
    session.enter_context(session.hold_all(used, "sweeps"))
    with _tracked(session, jobs[0].config, record, folder):
        _make_references(session, jobs)
        if jobs[0].config.discard_first:
            _warm_up(session, jobs, folder)
        _measure_ceilings(session, jobs, folder)
        session.display.begin_bar(len(jobs))
        session.started = True
        returns = launch([job.overrides for job in jobs])
        for outcome in returns:
            if outcome.status is JobStatus.FAILED:
                session.display.print_defect(" ".join(outcome.overrides or []), outcome._return_value)
        return returns


def plan_jobs(session: Session, overrides: list[list[str]], compose: Compose) -> list[Job]:
    """Compose and check every job, and return them in the order they are measured in."""
    if not overrides:
        raise ConfigError("the sweep has no samples: one of its axes has no values, as in sample=range(0)")
    jobs = _checked(session, overrides, compose)
    smaller = jobs[0].config.smaller_model
    chosen = any(override.startswith("model") for override in overrides[0])
    too_large = next((job.refusal for job in jobs if isinstance(job.refusal, TooLittleMemoryError)), None)
    if smaller and too_large and not chosen:
        session.display.print_note(f"{too_large}\nmeasuring {smaller} instead", "bold yellow")
        jobs = _checked(session, [[*own, f"model={smaller}"] for own in overrides], compose)
    refusals = [job.refusal for job in jobs if job.refusal]
    if len(refusals) == len(jobs):
        raise refusals[0]
    for text in dict.fromkeys(map(str, refusals)):
        session.display.print_note(f"will be skipped: {text}", "yellow")
    return in_blocks(jobs, jobs[0].config.order_seed)


def _checked(session: Session, overrides: list[list[str]], compose: Compose) -> list[Job]:
    jobs = []
    for own in overrides:
        try:
            config = build_config(compose(own))
            try:
                jobs.append(Job(own, config, prepared=session.prepare(config)))
            except REFUSALS as refusal:
                jobs.append(Job(own, config, refusal=refusal))
        except ConfigError as error:
            raise ConfigError(f"{error}\n(in the configuration {' '.join(own)}; nothing was started)") from error
    return jobs


def _record(jobs: Sequence[Job], folder: Path) -> SweepRecord:
    config = jobs[0].config
    varying = varying_keys(jobs)
    named = [(varying_values(_unmeasured(job), varying), job.config.sample) for job in jobs]
    models = dict.fromkeys(job.config.model.name for job in jobs)
    source = git_state(Path(__file__).parent)
    now = datetime.now(UTC)
    return SweepRecord(
        id=_id(folder, now),
        title=config.title or "+".join(models),
        command=redact_text(shlex.join(["ladezeit", *sys.argv[1:]])),
        varying=varying,
        samples_planned=len(jobs),
        started_at=now.isoformat(timespec="milliseconds"),
        host=socket.gethostname(),
        pid=os.getpid(),
        labels=make_labels(named),
        git_commit=source["commit"] if source else None,
    )


def _id(folder: Path, now: datetime) -> str:
    """Return the name of the sweep's folder, which says when it was; a name that does not gets the time as well.

    Sweeps are told apart by it in MLflow, and `hydra.sweep.dir` may end in the same name again and again.
    """
    return folder.name if _DATED.match(folder.name) else f"{folder.name}_{now:%Y-%m-%d_%H-%M-%S-%f}"


def _unmeasured(job: Job) -> Result:
    identity = Identity("", job.config.sample, 0, "", job.overrides, "")
    return one_job.not_started(job.config, identity, NotRunnableError(""))


@contextmanager
def _tracked(session: Session, config: RunConfig, record: SweepRecord, folder: Path) -> Iterator[None]:
    """Keep a parent run open for the block, and close it with the truth whatever ends the block."""
    tracker = session.get_tracker(config)
    session.sweep = record = tracker.begin_sweep(record, folder)
    record.save_record(folder)
    status = SweepStatus.FAILED
    try:
        yield
        status = SweepStatus.FINISHED
    except KeyboardInterrupt:
        status = SweepStatus.KILLED
        raise
    finally:
        session.display.finish_bar()
        _summarize(session, tracker, record, status, folder)


def _summarize(session: Session, tracker: Tracker, record: SweepRecord, status: SweepStatus, folder: Path) -> None:
    if not (folder / SWEEP_FILE_NAME).exists():  # somebody has removed it meanwhile: later samples are in it again
        folder.mkdir(parents=True, exist_ok=True)
        record.save_record(folder)
    gathered = gather_results(folder)
    results = [result for result in gathered.results if result.identity.sweep == record.id]
    for problem in gathered.problems:
        session.display.print_note(f"not in the table: {problem}", "yellow")
    session.results = results
    missing = record.samples_planned - len(results)
    if missing and status is SweepStatus.FINISHED:
        status = SweepStatus.FAILED
        session.display.print_note(f"{missing} of {record.samples_planned} samples have no result", "red")
    said, files = _report(session, results, record, folder) if results else ("", [])
    try:
        for at, result in gathered.by_folder.items():
            if result.identity.sweep == record.id and not (at / MARKER).exists():  # interrupted, or the store was away
                tracker.log_sample(result, at, record, record.varying)
        tracker.end_sweep(record, status, said, files)
        session.display.print_note(tracker.comparison_lines(record), "default")
    except TrackingError as error:
        session.display.print_note(f"the sweep's run in MLflow was not closed: {error}", "yellow")
    session.display.print_note(f"results: {folder}", "default")


def _report(session: Session, results: Sequence[Result], record: SweepRecord, folder: Path) -> tuple[str, list[Path]]:
    """Show the table and the verdict's words, write both and the report; return the words and what was written."""
    session.display.print_renderable(as_rich(results, record.varying))
    for line in closing_words(results, record.varying):
        session.display.print_note(line.replace("`", ""), "default")
    said = summarize_sweep(results, record.varying)
    (folder / SUMMARY_FILE).write_text(said, encoding="utf-8")
    report = write_report(folder, session.display)
    return said, [folder / SUMMARY_FILE, *([report] if report else [])]


def _warm_up(session: Session, jobs: Sequence[Job], folder: Path) -> None:
    """Measure the most demanding point once and never compare it.

    The first touch of memory that a virtual machine never used costs several times more than later ones, and the
    libraries' own files are not in the page cache yet; the first sample must not pay for the others.
    """

    def demand(job: Job) -> int:
        return job.prepared.checkpoint.file_bytes if job.prepared else -1

    job = max(jobs, key=demand)
    assert job.prepared is not None  # `plan_jobs` raises where no job can run
    own = folder / WARM_UP_FOLDER
    own.mkdir()
    identity = Identity(
        point_id(job.config), 0, -1, "warm-up", job.overrides, one_job.rerun_command(job.overrides, True)
    )
    session.display.show_sample("warm-up")
    with suppress(Exception):  # its samples will say why
        session.display.show_result(one_job.measure_sample(session, job.prepared, identity, own), counted=False)


def _make_references(session: Session, jobs: Sequence[Job]) -> None:
    """Make what the samples are verified by before the first of them; what cannot be made skips those that need it."""
    for job in jobs:
        if job.prepared:
            try:
                session.reference_files(job.prepared)
            except REFUSALS as refusal:
                session.display.print_note(f"cannot be verified: {refusal}", "yellow")


def _measure_ceilings(session: Session, jobs: Sequence[Job], folder: Path) -> None:
    """Measure what the machine allows, once for each device and checkpoint, where all jobs of the sweep find it."""
    for job in jobs:
        if job.prepared and job.config.ceilings is not False:
            session.get_ceilings(job.prepared.device, job.prepared.checkpoint)
    session.save_ceilings(folder)


# The report that every sweep ends with; what goes wrong in it costs the sweep a line, and nothing else.


def write_report(folder: Path, display: Display) -> Path | None:
    """Write the report on the sweep in `folder` into its folder ``report`` and return that.

    None where there is no report; why is said on the display.
    """
    try:
        from ladezeit.report.document import build_report
        from ladezeit.report.render import write_report
        from ladezeit.results.reader import read_paths

        page = write_report(build_report(read_paths([folder])), folder / REPORT_FOLDER, _REPORT_NAME)[1]
    except Exception as error:  # a picture of the results must never cost the results
        display.print_note(
            f"no report was written ({type(error).__name__}: {error}); "
            f"the results are complete: ladezeit-results report {folder}",
            "yellow",
        )
        return None
    display.print_note(f"report: {page}", "default")
    return folder / REPORT_FOLDER
