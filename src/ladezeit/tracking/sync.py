"""Brings a store in line with the files: what it lacks is written, runs of dead processes get their true end."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError, TrackingError
from ladezeit.report.verdict import summarize_sweep
from ladezeit.results.reader import gather_results, sample_folders
from ladezeit.results.records import FILE_NAME, SWEEP_FILE_NAME, Result, SweepRecord, read_result
from ladezeit.tracking import mlflow_tracker, projection
from ladezeit.tracking.mlflow_tracker import MARKER, MlflowTracker
from ladezeit.tracking.owner import Life, Owner
from ladezeit.tracking.projection import ended_ms, identity_of
from ladezeit.tracking.store import report_errors
from ladezeit.tracking.tracker import SweepStatus, Tracker, Untracked

SUMMARY_FILE = "summary.md"
REPORT_FOLDER = "report"

_NO_STORE = "tracking=none keeps nothing: import with tracking=sqlite or tracking=server"


class Fate(Enum):
    """What is done with an open run."""

    left_alone = "left alone"  # its process lives, or cannot be seen from here
    from_files = "from files"  # its files tell how it ended
    killed = "killed"  # nothing tells: it is KILLED, with the reason


@dataclass(frozen=True)
class Finding:
    """An open run: what is done with it, and why. `folder` holds the files that tell its end."""

    run_id: str
    name: str
    role: str
    fate: Fate
    why: str
    folder: Path | None = None


def find_orphans(tracker: MlflowTracker, sweeps: Path) -> list[Finding]:
    """Return what would become of each open run; nothing is changed.

    Args:
        tracker: an open tracker.
        sweeps: where the folders of sweeps lie, for those that were moved there.

    Raises:
        TrackingError: the store did not answer.
    """
    with report_errors("looking for open runs"):
        runs = mlflow_tracker.left_open(tracker.store)
    return [_finding(run, sweeps) for run in runs]


def close_orphans(tracker: MlflowTracker, sweeps: Path) -> list[Finding]:
    """Set every run of a dead process to its true end, and return what was found and done.

    Raises:
        TrackingError: the store failed; what was set until then stays.
    """
    found = find_orphans(tracker, sweeps)
    for finding in found:
        if finding.fate is Fate.from_files and finding.folder is not None:
            _close_from_files(finding, finding.folder, tracker)
        elif finding.fate is Fate.killed:
            tracker.explain_run(finding.run_id, finding.why, end=True)
    return found


def _finding(run: Any, sweeps: Path) -> Finding:
    tags = run.data.tags
    role = tags[projection.ROLE_TAG]
    owner = Owner.of_tags(tags)

    def is_(fate: Fate, why: str, folder: Path | None = None) -> Finding:
        return Finding(run.info.run_id, str(run.info.run_name), role, fate, why, folder)

    if owner is None:
        return is_(Fate.left_alone, "it does not say which process opened it")
    life = owner.check_life()
    if life is Life.lives:
        return is_(Fate.left_alone, f"{owner.words} lives")
    if life is not Life.dead:
        return is_(
            Fate.left_alone, f"{owner.words} cannot be seen from here: it belongs to another machine or container"
        )
    folder = _sweep_folder(tags, sweeps) if role == "sweep" else _sample_folder(tags, sweeps)
    if folder is not None:
        return is_(Fate.from_files, f"{owner.words} died; {folder} tells how it ended", folder)
    return is_(Fate.killed, f"{owner.words} died, and no result is left")


def _sweep_folder(tags: dict[str, str], sweeps: Path) -> Path | None:
    """Return the folder of the sweep where it still lies, or was moved below `sweeps`."""
    wanted = tags.get(projection.SWEEP_TAG)
    noted = [Path(tags[projection.FOLDER_TAG])] if projection.FOLDER_TAG in tags else []
    for folder in [*noted, *sorted(path.parent for path in sweeps.glob(f"*/{SWEEP_FILE_NAME}"))]:
        try:
            if projection.sweep_tag(SweepRecord.read_record(folder).id) == wanted:
                return folder
        except LadezeitError:
            continue
    return None


def _sample_folder(tags: dict[str, str], sweeps: Path) -> Path | None:
    """Return the folder of the very sample, where its result is still there."""
    identity = tags.get(projection.IDENTITY_TAG)
    own = Path(tags[projection.FOLDER_TAG]) if projection.FOLDER_TAG in tags else None
    if own is not None and _identity(own) == identity:
        return own
    of_sweep = _sweep_folder(tags, sweeps) if projection.SWEEP_TAG in tags else None
    if of_sweep is None:
        return None
    return next(
        (at for at, r in gather_results(of_sweep).by_folder.items() if projection.identity_of(r) == identity), None
    )


def _identity(folder: Path) -> str | None:
    try:
        return projection.identity_of(read_result(folder))
    except LadezeitError:
        return None


def _close_from_files(finding: Finding, folder: Path, tracker: MlflowTracker) -> None:
    if finding.role == "sweep":
        sweep, own = samples_of(folder)
        import_samples(folder, tracker, sweep, own, list(own))
        if sweep is not None and len(own) < sweep.samples_planned:
            tracker.explain_run(
                finding.run_id, f"{finding.why}: {len(own)} of {sweep.samples_planned} samples", end=False
            )
        return
    result: Result = read_result(folder)
    sweep = _sweep_of(result, folder)
    varying = sweep.varying if sweep else [o.lstrip("+~").partition("=")[0] for o in result.identity.overrides]
    tracker.log_sample(result, folder, sweep, varying)


def _sweep_of(result: Result, folder: Path) -> SweepRecord | None:
    if result.identity.sweep is None:
        return None
    return next((SweepRecord.read_record(up) for up in folder.parents if (up / SWEEP_FILE_NAME).is_file()), None)


# Samples that no store knows yet, and their way into one later with the times at which they were measured.


def pending_samples(folder: Path) -> list[Path]:
    """Return the folders of samples at or below `folder` that were not logged."""
    return [sample for sample in gather_results(folder).by_folder if not (sample / MARKER).exists()]


def samples_of(folder: Path) -> tuple[SweepRecord | None, dict[Path, Result]]:
    """Return the record of a sweep's folder (None for a single run's) and the samples that belong to it, by folder.

    Raises:
        LadezeitError: `folder` is not a folder, or its ``sweep.json`` cannot be read.
    """
    gathered = gather_results(folder)
    sweep = SweepRecord.read_record(folder) if (folder / SWEEP_FILE_NAME).exists() else None
    return sweep, {at: r for at, r in gathered.by_folder.items() if r.identity.sweep == (sweep.id if sweep else None)}


def import_unlogged(folder: Path, tracker: Tracker, *, everything: bool = False) -> int:
    """Log the samples of a sweep's folder (or of a single run's) that were not logged, and return how many.

    Args:
        folder: what ``sweep.json`` or ``result.json`` lies in.
        tracker: an open tracker.
        everything: take also what was logged once: into a new store everything has to go again. A sample that the
            store knows is not doubled.

    Raises:
        TrackingError: there is no store, or it failed; what was imported until then stays. Call again later.
        LadezeitError: `folder` is not a folder, or its ``sweep.json`` cannot be read.
    """
    sweep, own = samples_of(folder)
    wanted = [at for at in own if everything or not (at / MARKER).exists()]
    if wanted:
        import_samples(folder, tracker, sweep, own, wanted)
    elif isinstance(tracker, Untracked):
        raise TrackingError(_NO_STORE)
    return len(wanted)


def import_samples(
    folder: Path, tracker: Tracker, sweep: SweepRecord | None, own: Mapping[Path, Result], wanted: Collection[Path]
) -> None:
    """Log the samples at `wanted`, and close the run of their sweep with the truth about all of its `own` samples.

    Raises:
        TrackingError: there is no store, or it failed; what was imported until then stays. Call again later.
    """
    if isinstance(tracker, Untracked):
        raise TrackingError(_NO_STORE)
    if sweep is not None:
        sweep = tracker.begin_sweep(sweep, folder)
    for at in wanted:
        result = own[at]
        tracker.log_sample(result, at, sweep, sweep.varying if sweep else _overridden(result))
    if sweep is not None:
        _close(sweep, list(own.values()), folder, tracker)


def _overridden(result: Result) -> list[str]:
    return [override.lstrip("+~").partition("=")[0] for override in result.identity.overrides]


def _close(sweep: SweepRecord, results: list[Result], folder: Path, tracker: Tracker) -> None:
    complete = len(results) >= sweep.samples_planned
    written = folder / SUMMARY_FILE
    said = written.read_text(encoding="utf-8") if complete and written.is_file() else ""
    tracker.end_sweep(
        sweep,
        SweepStatus.FINISHED if complete else SweepStatus.KILLED,
        said or (summarize_sweep(results, sweep.varying) if results else "no sample was finished"),
        [path for path in (written, folder / REPORT_FOLDER) if path.exists()],
        ended_ms=max((ended_ms(result) for result in results), default=None),
    )


# Brings a store in line with the files: what is missing in it is written, what is there already is left alone.


@dataclass(frozen=True)
class Synced:
    """What became of a folder: how many samples were written, how many were there, or why it was left alone.

    `sweep` is the record of the sweep, with its run in the store; None for a single run.
    """

    folder: Path
    written: int
    known: int
    left_alone: str | None = None
    sweep: SweepRecord | None = None


def list_folders(path: Path) -> Iterator[Path]:
    """Yield the folders of sweeps and of single runs at or below `path`, in path order.

    Raises:
        LadezeitError: `path` is no folder, or holds neither.
    """
    if not path.is_dir():
        raise LadezeitError(f"{path} is no folder: give the folder of a sweep, of a run, or one that holds several")
    sweeps = sorted({record.parent for record in path.rglob(SWEEP_FILE_NAME)})
    single = [own for own in sample_folders(path) if not any(own.is_relative_to(sweep) for sweep in sweeps)]
    if not sweeps and not single:
        raise LadezeitError(f"no {SWEEP_FILE_NAME} and no {FILE_NAME} at or below {path}: there is nothing to import")
    yield from sorted([*sweeps, *single])


def sync_folder(folder: Path, tracker: MlflowTracker) -> Synced:
    """Write what the store lacks of one sweep, or of one single run; calling it again changes nothing.

    Raises:
        TrackingError: the store failed; what was written stays. Call again later.
        LadezeitError: the folder's files cannot be read or marked.
    """
    sweep, own = samples_of(folder)
    try:
        return _sync_sweep(folder, tracker, sweep, own) if sweep else _sync_single(folder, tracker, own)
    except OSError as cause:
        where = cause.filename or folder
        raise LadezeitError(f"{where}: {cause.strerror}. The folder is marked when it is brought in: copy it") from None


def _sync_single(folder: Path, tracker: MlflowTracker, own: dict[Path, Result]) -> Synced:
    with report_errors("looking for the sample"):
        wanted = [at for at, result in own.items() if _is_open(mlflow_tracker.run_of(tracker.store, result))]
    if wanted:
        import_samples(folder, tracker, None, own, wanted)
    return Synced(folder, len(wanted), len(own) - len(wanted))


def _sync_sweep(folder: Path, tracker: MlflowTracker, sweep: SweepRecord, own: dict[Path, Result]) -> Synced:
    with report_errors(f"looking for sweep {sweep.id}"):
        parent = mlflow_tracker.parent_of(tracker.store, sweep)
        known = mlflow_tracker.complete_samples(tracker.store, sweep)
    is_open = parent is not None and _is_open(parent)
    if is_open and (reason := _still_running(parent.data.tags, sweep, own)):
        return Synced(folder, 0, 0, reason, sweep)
    missing = [at for at, result in own.items() if identity_of(result) not in known]
    unmarked = [at for at in own if at not in missing and not (at / MARKER).exists()]
    if _is_open(parent) or missing or unmarked:
        import_samples(folder, tracker, sweep, own, [*missing, *unmarked])
        sweep = SweepRecord.read_record(folder)
    else:
        tracker.save_view(sweep)
    return Synced(folder, len(missing), len(own) - len(missing), None, sweep)


def _is_open(run: Any) -> bool:
    """Say whether a run has to be written (again): there is none, or it was cut off."""
    return run is None or run.info.status == "RUNNING"


def _still_running(tags: dict[str, str], sweep: SweepRecord, own: dict[Path, Result]) -> str | None:
    """Return why an open sweep is not to be touched, None where nobody works on it any more."""
    if len(own) >= sweep.samples_planned:
        return None
    owner = Owner.of_tags(tags)
    if owner is None:
        return "its run is open and does not say which process opened it"
    life = owner.check_life()
    if life is Life.dead or owner == Owner.this_process():
        return None
    return (
        f"{owner.words} is at it" if life is Life.lives else f"{owner.words} may be at it: it cannot be seen from here"
    )
