"""Brings a store in line with the files on disk, which are the truth.

Runs that are missing are made, half-written ones are filled, those of dead processes get their true end, and of
duplicates the oldest is kept. Doing it again changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.report.verdict import summarize_sweep
from ladezeit.results.reader import gather_results, sample_folders, sweep_folders
from ladezeit.results.records import (
    FILE_NAME,
    REPORT_FOLDER,
    SUMMARY_FILE,
    SWEEP_FILE_NAME,
    Result,
    SweepRecord,
    read_result,
)
from ladezeit.tracking.mlflow_tracker import MlflowTracker, is_deleted
from ladezeit.tracking.owner import Life, Owner
from ladezeit.tracking.projection import (
    FOLDER_TAG,
    IDENTITY_TAG,
    PARENT_TAG,
    ROLE_TAG,
    SWEEP_TAG,
    condition_of,
    ended_ms,
    identity_of,
    sweep_tag,
)
from ladezeit.tracking.tracker import SweepStatus


@dataclass(frozen=True)
class Synced:
    """What became of a folder: how many samples were written, how many were there, or why it was left alone.

    `known` counts runs that a person deleted too: they stay deleted. `sweep` is the record of the sweep, with its run
    in the store; None for a single run.
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
    sweeps = sweep_folders(path)
    single = [own for own in sample_folders(path) if not any(own.is_relative_to(sweep) for sweep in sweeps)]
    if not sweeps and not single:
        raise LadezeitError(f"no {SWEEP_FILE_NAME} and no {FILE_NAME} at or below {path}: there is nothing to import")
    yield from sorted([*sweeps, *single])


def sync_folder(folder: Path, tracker: MlflowTracker) -> Synced:
    """Bring the runs of one sweep, or of one single run, in line with its files.

    A sweep that is still running is left alone, and so is one whose run a person deleted.

    Raises:
        TrackingError: the store failed; what was written stays. Call again later.
        LadezeitError: the folder's files cannot be read or marked.
    """
    gathered = gather_results(folder)
    sweep = SweepRecord.read_record(folder) if (folder / SWEEP_FILE_NAME).exists() else None
    own = {at: r for at, r in gathered.by_folder.items() if r.identity.sweep == (sweep.id if sweep else None)}
    try:
        return _sync_sweep(folder, tracker, sweep, own) if sweep else _sync_single(folder, tracker, own)
    except OSError as cause:
        where = cause.filename or folder
        raise LadezeitError(f"{where}: {cause.strerror}. The folder is marked when it is brought in: copy it") from None


def _sync_single(folder: Path, tracker: MlflowTracker, own: dict[Path, Result]) -> Synced:
    written = 0
    for at, result in own.items():
        with tracker.reporting("looking for the sample"):
            missing = _is_missing(tracker.find_run(result))
        if missing:
            tracker.log_sample(result, at, None, _overridden(result))
            written += 1
    return Synced(folder, written, len(own) - written)


def _sync_sweep(folder: Path, tracker: MlflowTracker, sweep: SweepRecord, own: dict[Path, Result]) -> Synced:
    by_identity: dict[str, list[Any]] = {}
    with tracker.reporting(f"looking for sweep {sweep.id}"):
        for run in tracker.store.search_runs(condition_of(sweep), with_deleted=True):
            tags = run.data.tags
            key = {"sweep": "", "sample": tags.get(IDENTITY_TAG, "")}.get(tags.get(ROLE_TAG))
            if key is not None:
                by_identity.setdefault(key, []).append(run)
        parent = tracker.settle_duplicates(by_identity.pop("", []))
        if parent is not None and (reason := _hands_off(parent, sweep, own)):
            return Synced(folder, 0, 0, reason, sweep)
        runs = {identity: tracker.settle_duplicates(several) for identity, several in by_identity.items()}
    missing = [at for at, result in own.items() if _is_missing(runs.get(identity_of(result)))]
    lost = _lost(runs, {identity_of(result) for result in own.values()})
    if parent is None or parent.info.status == "RUNNING" or missing or lost:
        sweep = tracker.begin_sweep(sweep, folder)
        for at in missing:
            tracker.log_sample(own[at], at, sweep, sweep.varying)
        for run_id, reason in lost.items():
            tracker.explain_run(run_id, reason, end=True)
        _close(sweep, list(own.values()), folder, tracker)
    else:
        sweep = _known(sweep, parent, folder)
        tracker.save_view(sweep)
    with tracker.reporting(f"putting the samples below sweep {sweep.id}"):
        for run in runs.values():
            if run.data.tags.get(PARENT_TAG) != sweep.parent_run_id and not is_deleted(run):
                tracker.set_parent(run.info.run_id, sweep)
    return Synced(folder, len(missing), len(own) - len(missing), None, sweep)


def _known(sweep: SweepRecord, parent: Any, folder: Path) -> SweepRecord:
    """Return the record with the ids of its run in this store, which a copied one does not have."""
    ids = {"experiment_id": parent.info.experiment_id, "parent_run_id": parent.info.run_id}
    if any(getattr(sweep, key) != value for key, value in ids.items()):
        sweep = replace(sweep, **ids)
        sweep.save_record(folder)
    return sweep


def _is_missing(run: Any) -> bool:
    """Say whether a sample has to be written (again): there is no run, or it was cut off."""
    return run is None or (run.info.status == "RUNNING" and not is_deleted(run))


def _overridden(result: Result) -> list[str]:
    return [override.lstrip("+~").partition("=")[0] for override in result.identity.overrides]


def _hands_off(parent: Any, sweep: SweepRecord, own: dict[Path, Result]) -> str | None:
    """Return why a sweep is not to be touched, None where nobody works on it any more."""
    if is_deleted(parent):
        return "its run was deleted in MLflow"
    if parent.info.status != "RUNNING" or len(own) >= sweep.samples_planned:
        return None
    owner = Owner.of_tags(parent.data.tags)
    if owner is None:
        return "its run is open and does not say which process opened it"
    life = owner.check_life()
    if life is Life.dead or owner == Owner.this_process():
        return None
    return (
        f"{owner.words} is at it" if life is Life.lives else f"{owner.words} may be at it: it cannot be seen from here"
    )


def _lost(runs: dict[str, Any], known: set[str]) -> dict[str, str]:
    """Return the open runs of dead processes that no file tells the end of, with the reason."""
    found = {}
    for identity, run in runs.items():
        owner = Owner.of_tags(run.data.tags)
        is_open = run.info.status == "RUNNING" and not is_deleted(run) and identity not in known
        if is_open and owner is not None and owner.check_life() is Life.dead:
            found[run.info.run_id] = _no_result(owner)
    return found


def _no_result(owner: Owner) -> str:
    return f"{owner.words} died, and no result is left"


def _close(sweep: SweepRecord, results: list[Result], folder: Path, tracker: MlflowTracker) -> None:
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
    if not complete and sweep.parent_run_id is not None:
        reason = f"cut off: {len(results)} of {sweep.samples_planned} samples have a result"
        tracker.explain_run(sweep.parent_run_id, reason, end=False)


# The closing part of it, from the store's side: every open run, wherever its files lie.


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
    """Return what would become of each open run, those of sweeps first; nothing is changed.

    Args:
        tracker: an open tracker.
        sweeps: where the folders of sweeps lie, for those that were moved there.

    Raises:
        TrackingError: the store did not answer.
    """
    with tracker.reporting("looking for open runs"):
        found = tracker.store.search_runs("attributes.status = 'RUNNING'")
    runs = [run for run in found if run.data.tags.get(ROLE_TAG) in ("sweep", "sample")]
    runs.sort(key=lambda run: (run.data.tags[ROLE_TAG] != "sweep", run.info.start_time))
    return [_finding(run, sweeps) for run in runs]


def close_orphans(tracker: MlflowTracker, sweeps: Path) -> list[Finding]:
    """Set every run of a dead process to its true end, and return what was found and done.

    Raises:
        TrackingError: the store failed; what was set until then stays.
    """
    found = find_orphans(tracker, sweeps)
    for finding in found:
        if finding.folder is not None and finding.role == "sweep":
            sync_folder(finding.folder, tracker)
        elif finding.folder is not None:
            result = read_result(finding.folder)
            above = next((up for up in finding.folder.parents if (up / SWEEP_FILE_NAME).is_file()), None)
            sweep = SweepRecord.read_record(above) if above and result.identity.sweep else None
            tracker.log_sample(result, finding.folder, sweep, sweep.varying if sweep else _overridden(result))
        elif finding.fate is Fate.killed:
            tracker.explain_run(finding.run_id, finding.why, end=True)
    return found


def _finding(run: Any, sweeps: Path) -> Finding:
    tags = run.data.tags
    role = tags[ROLE_TAG]
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
    folder = _folder_of(tags, sweeps)
    if folder is not None:
        return is_(Fate.from_files, f"{owner.words} died; {folder} tells how it ended", folder)
    return is_(Fate.killed, _no_result(owner))


def _folder_of(tags: dict[str, str], sweeps: Path) -> Path | None:
    """Return the folder of the sweep or of the sample, where it was or where its sweep was moved below `sweeps`."""
    noted = Path(tags.get(FOLDER_TAG, ""))
    moved = [folder if tags[ROLE_TAG] == "sweep" else folder / noted.name for folder in sweep_folders(sweeps)]
    return next((folder for folder in [noted, *moved] if _holds(folder, tags)), None)


def _holds(folder: Path, tags: dict[str, str]) -> bool:
    try:
        if tags[ROLE_TAG] == "sweep":
            return sweep_tag(SweepRecord.read_record(folder).id) == tags[SWEEP_TAG]
        return identity_of(read_result(folder)) == tags[IDENTITY_TAG]
    except (KeyError, LadezeitError):
        return False
