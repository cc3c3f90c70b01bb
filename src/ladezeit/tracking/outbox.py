"""Samples that no store knows yet, and their way into one later with the times at which they were measured."""

from pathlib import Path

from ladezeit.errors import TrackingError
from ladezeit.result import SWEEP_FILE_NAME, Result, SweepRecord
from ladezeit.results.gather import gather
from ladezeit.results.table import as_markdown
from ladezeit.tracking.base import SweepStatus, Tracker, Untracked
from ladezeit.tracking.projection import ended_ms
from ladezeit.tracking.sample_files import MARKER


def unlogged(folder: Path) -> list[Path]:
    """Return the folders of samples at or below `folder` that were not logged."""
    return [sample for sample in gather(folder).by_folder if not (sample / MARKER).exists()]


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
    if isinstance(tracker, Untracked):
        raise TrackingError("tracking=none keeps nothing: import with tracking=sqlite or tracking=server")
    gathered = gather(folder)
    sweep = SweepRecord.read(folder) if (folder / SWEEP_FILE_NAME).exists() else None
    own = {at: result for at, result in gathered.by_folder.items() if result.identity.sweep == _id(sweep)}
    wanted = {at: result for at, result in own.items() if everything or not (at / MARKER).exists()}
    if not wanted:
        return 0
    if sweep is not None:
        sweep = tracker.begin_sweep(sweep, folder)
    for at, result in wanted.items():
        tracker.log_sample(result, at, sweep, sweep.varying if sweep else _overridden(result))
    if sweep is not None:
        _close(sweep, list(own.values()), folder, tracker)
    return len(wanted)


def _id(sweep: SweepRecord | None) -> str | None:
    return sweep.id if sweep else None


def _overridden(result: Result) -> list[str]:
    return [override.lstrip("+~").partition("=")[0] for override in result.identity.overrides]


def _close(sweep: SweepRecord, results: list[Result], folder: Path, tracker: Tracker) -> None:
    complete = len(results) >= sweep.samples_planned
    tracker.end_sweep(
        sweep,
        SweepStatus.FINISHED if complete else SweepStatus.KILLED,
        as_markdown(results, sweep.varying),
        [path for path in (folder / "summary.md",) if path.exists()],
        ended_ms=max(ended_ms(result) for result in results),
    )
