"""Brings a store in line with the files: what is missing in it is written, what is there already is left alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.result import FILE_NAME, SWEEP_FILE_NAME, Result, SweepRecord
from ladezeit.results.gather import sample_folders
from ladezeit.tracking import known_runs
from ladezeit.tracking.mlflow_tracker import MlflowTracker
from ladezeit.tracking.outbox import import_samples, samples_of
from ladezeit.tracking.owner import Life, Owner
from ladezeit.tracking.projection import identity_of
from ladezeit.tracking.sample_files import MARKER
from ladezeit.tracking.store import reported


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


def folders(path: Path) -> Iterator[Path]:
    """Yield the folders of sweeps and of single runs at or below `path`, in path order.

    Raises:
        LadezeitError: `path` is no folder, or holds neither.
    """
    if not path.is_dir():
        raise LadezeitError(f"{path} is no folder: give the folder of a sweep, of a run, or one that holds several")
    sweeps = sorted({record.parent for record in path.rglob(SWEEP_FILE_NAME)})
    single = [own for own in sample_folders(path) if not any(own.is_relative_to(sweep) for sweep in sweeps)]
    if not sweeps and not single:
        raise LadezeitError(f"no {SWEEP_FILE_NAME} and no {FILE_NAME} at or below {path}: there is nothing to bring in")
    yield from sorted([*sweeps, *single])


def sync(folder: Path, tracker: MlflowTracker) -> Synced:
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
    with reported("looking for the sample"):
        wanted = [at for at, result in own.items() if _is_open(known_runs.run_of(tracker.store, result))]
    if wanted:
        import_samples(folder, tracker, None, own, wanted)
    return Synced(folder, len(wanted), len(own) - len(wanted))


def _sync_sweep(folder: Path, tracker: MlflowTracker, sweep: SweepRecord, own: dict[Path, Result]) -> Synced:
    with reported(f"looking for sweep {sweep.id}"):
        parent = known_runs.parent_of(tracker.store, sweep)
        known = known_runs.complete(tracker.store, sweep)
    is_open = parent is not None and _is_open(parent)
    if is_open and (reason := _still_running(parent.data.tags, sweep, own)):
        return Synced(folder, 0, 0, reason, sweep)
    missing = [at for at, result in own.items() if identity_of(result) not in known]
    unmarked = [at for at in own if at not in missing and not (at / MARKER).exists()]
    if _is_open(parent) or missing or unmarked:
        import_samples(folder, tracker, sweep, own, [*missing, *unmarked])
        sweep = SweepRecord.read(folder)
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
    life = owner.life()
    if life is Life.dead or owner == Owner.this_process():
        return None
    return (
        f"{owner.words} is at it" if life is Life.lives else f"{owner.words} may be at it: it cannot be seen from here"
    )
