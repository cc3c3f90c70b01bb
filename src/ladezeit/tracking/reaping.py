"""Runs that are marked as running although their process is dead, and the end that they really had."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ladezeit.errors import LadezeitError
from ladezeit.result import SWEEP_FILE_NAME, Result, SweepRecord, read
from ladezeit.results.gather import gather
from ladezeit.tracking import known_runs, projection
from ladezeit.tracking.mlflow_tracker import MlflowTracker
from ladezeit.tracking.outbox import import_samples, samples_of
from ladezeit.tracking.owner import Life, Owner
from ladezeit.tracking.store import reported


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


def look(tracker: MlflowTracker, sweeps: Path) -> list[Finding]:
    """Return what would become of each open run; nothing is changed.

    Args:
        tracker: an open tracker.
        sweeps: where the folders of sweeps lie, for those that were moved there.

    Raises:
        TrackingError: the store did not answer.
    """
    with reported("looking for open runs"):
        runs = known_runs.left_open(tracker.store)
    return [_finding(run, sweeps) for run in runs]


def reap(tracker: MlflowTracker, sweeps: Path) -> list[Finding]:
    """Set every run of a dead process to its true end, and return what was found and done.

    Raises:
        TrackingError: the store failed; what was set until then stays.
    """
    found = look(tracker, sweeps)
    for finding in found:
        if finding.fate is Fate.from_files and finding.folder is not None:
            _close_from_files(finding, finding.folder, tracker)
        elif finding.fate is Fate.killed:
            tracker.explain(finding.run_id, finding.why, end=True)
    return found


def _finding(run: Any, sweeps: Path) -> Finding:
    tags = run.data.tags
    role = tags[projection.ROLE_TAG]
    owner = Owner.of_tags(tags)

    def is_(fate: Fate, why: str, folder: Path | None = None) -> Finding:
        return Finding(run.info.run_id, str(run.info.run_name), role, fate, why, folder)

    if owner is None:
        return is_(Fate.left_alone, "it does not say which process opened it")
    life = owner.life()
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
            if projection.sweep_tag(SweepRecord.read(folder).id) == wanted:
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
    return next((at for at, r in gather(of_sweep).by_folder.items() if projection.identity_of(r) == identity), None)


def _identity(folder: Path) -> str | None:
    try:
        return projection.identity_of(read(folder))
    except LadezeitError:
        return None


def _close_from_files(finding: Finding, folder: Path, tracker: MlflowTracker) -> None:
    if finding.role == "sweep":
        sweep, own = samples_of(folder)
        import_samples(folder, tracker, sweep, own, list(own))
        if sweep is not None and len(own) < sweep.samples_planned:
            tracker.explain(finding.run_id, f"{finding.why}: {len(own)} of {sweep.samples_planned} samples", end=False)
        return
    result: Result = read(folder)
    sweep = _sweep_of(result, folder)
    varying = sweep.varying if sweep else [o.lstrip("+~").partition("=")[0] for o in result.identity.overrides]
    tracker.log_sample(result, folder, sweep, varying)


def _sweep_of(result: Result, folder: Path) -> SweepRecord | None:
    if result.identity.sweep is None:
        return None
    return next((SweepRecord.read(up) for up in folder.parents if (up / SWEEP_FILE_NAME).is_file()), None)
