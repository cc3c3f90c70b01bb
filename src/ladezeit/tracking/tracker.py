"""What a sweep asks of its tracking, and the tracking that keeps nothing."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from ladezeit.results.records import Result, SweepRecord


class SweepStatus(Enum):
    """How a sweep ended, in MLflow's words."""

    FINISHED = "FINISHED"  # every planned sample has a result, whatever its status
    FAILED = "FAILED"  # the sweep itself broke
    KILLED = "KILLED"  # ended by Ctrl-C or a signal


class Tracker:
    """Where samples and sweeps are logged besides their files, which no method changes.

    This one is `tracking=none`: results are files and nothing else.
    """

    def begin_sweep(self, record: SweepRecord, folder: Path) -> SweepRecord:
        """Open the sweep's own run, save the record with its ids to ``folder/sweep.json`` and return it.

        A sweep that the store knows already (same `record.id`) keeps its run, which is running again.

        Raises:
            TrackingError: the store did not answer or refused; `ladezeit-results sync` can do it later.
        """
        record.save_record(folder)
        return record

    def log_sample(self, result: Result, folder: Path, sweep: SweepRecord | None, varying: Sequence[str]) -> str:
        """Write one sample as a run and return the run's id; the same sample logged again is the same run.

        `folder` holds the sample's files; the marker ``.mlflow_run_id`` is left in it. `varying` are the config keys
        to log as params (`sweep.varying`, or what a single run overrides).

        Raises:
            TrackingError: the run was not written completely; the sample has no marker.
        """
        return ""

    def end_sweep(
        self,
        record: SweepRecord,
        status: SweepStatus,
        summary_markdown: str,
        artifacts: Sequence[Path] = (),
        *,
        ended_ms: int | None = None,
    ) -> None:
        """Close the sweep's own run with the summary as its description and `artifacts` (files, folders) attached.

        `ended_ms` is when the sweep ended, in milliseconds since 1970; now where it is None.

        Raises:
            TrackingError: the run could not be closed.
        """

    def comparison_lines(self, of: SweepRecord | str | None) -> str:
        """Return the lines to print so that a person can open the sweep's comparison, or the run with that id."""
        return "MLflow: none (tracking=none); the results are files only"
