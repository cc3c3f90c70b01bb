"""Samples that no store knows yet, and their way into one later with the times at which they were measured."""

from collections.abc import Collection, Mapping
from pathlib import Path

from ladezeit.errors import TrackingError
from ladezeit.result import SWEEP_FILE_NAME, Result, SweepRecord
from ladezeit.results.gather import gather
from ladezeit.results.summary import summary
from ladezeit.tracking.base import SweepStatus, Tracker, Untracked
from ladezeit.tracking.projection import ended_ms
from ladezeit.tracking.sample_files import MARKER

SUMMARY_FILE = "summary.md"
REPORT_FOLDER = "report"


def unlogged(folder: Path) -> list[Path]:
    """Return the folders of samples at or below `folder` that were not logged."""
    return [sample for sample in gather(folder).by_folder if not (sample / MARKER).exists()]


def samples_of(folder: Path) -> tuple[SweepRecord | None, dict[Path, Result]]:
    """Return the record of a sweep's folder (None for a single run's) and the samples that belong to it, by folder.

    Raises:
        LadezeitError: `folder` is not a folder, or its ``sweep.json`` cannot be read.
    """
    gathered = gather(folder)
    sweep = SweepRecord.read(folder) if (folder / SWEEP_FILE_NAME).exists() else None
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


_NO_STORE = "tracking=none keeps nothing: import with tracking=sqlite or tracking=server"


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
        said or (summary(results, sweep.varying) if results else "no sample was finished"),
        [path for path in (written, folder / REPORT_FOLDER) if path.exists()],
        ended_ms=max((ended_ms(result) for result in results), default=None),
    )
