"""`ladezeit-results sync`: result files into MLflow, as often as one likes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ladezeit.cli.results_commands.stores import DEFAULT_EXPERIMENT, Experiment, TrackingUri, open_store, outputs_folder


def sync_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of sweeps or runs, or folders that hold them. Default: outputs/sweeps."),
    ] = None,
    *,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Import the results on disk that MLflow lacks, wherever they were measured; nothing is duplicated."""
    from ladezeit.tracking.sync import list_folders, sync_folder

    units = [unit for path in paths or [outputs_folder() / "sweeps"] for unit in list_folders(path)]
    tracker = open_store(experiment, tracking_uri)
    newest = None
    for unit in dict.fromkeys(units):
        done = sync_folder(unit, tracker)
        said = f"left alone: {done.left_alone}" if done.left_alone else f"{done.written} written, {done.known} known"
        print(f"{unit}: {said}")
        if done.sweep is not None and not done.left_alone:
            newest = max(filter(None, (newest, done.sweep)), key=lambda record: record.started_at)
    print(tracker.comparison_lines(newest), file=sys.stderr)
