"""The commands about MLflow: `sync` (files into it), `reap` (closes what is dead), `ui` (shows it)."""

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from ladezeit.cli.results_commands.options import (
    DEFAULT_EXPERIMENT,
    StoreExperiment,
    TrackingUri,
    open_store,
    outputs_folder,
)
from ladezeit.errors import TrackingError

if TYPE_CHECKING:
    from ladezeit.tracking.store import Store
    from ladezeit.tracking.sync import Finding


def sync_command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of sweeps or runs, or folders that hold them. Default: outputs/sweeps."),
    ] = None,
    *,
    experiment: StoreExperiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Bring MLflow in line with the results on disk, wherever they were measured; nothing is duplicated.

    Without folders it also does what reap does.
    """
    from ladezeit.tracking.sync import Fate, close_orphans, list_folders, sync_folder

    units = [unit for path in paths or [outputs_folder() / "sweeps"] for unit in list_folders(path)]
    tracker = open_store(experiment, tracking_uri)
    newest = None
    for unit in dict.fromkeys(units):
        done = sync_folder(unit, tracker)
        said = f"left alone: {done.left_alone}" if done.left_alone else f"{done.written} written, {done.known} known"
        print(f"{unit}: {said}")
        if done.sweep is not None and not done.left_alone:
            newest = max(filter(None, (newest, done.sweep)), key=lambda record: record.started_at)
    if not paths:
        closed = close_orphans(tracker, outputs_folder() / "sweeps")
        _print_findings([finding for finding in closed if finding.fate is not Fate.left_alone])
    print(tracker.comparison_lines(newest), file=sys.stderr)


def reap_command(
    *,
    experiment: StoreExperiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
) -> None:
    """Close the runs of dead processes with their true status; runs of live processes and other machines stay."""
    from ladezeit.tracking.sync import Fate, close_orphans, find_orphans

    tracker = open_store(experiment, tracking_uri)
    sweeps = outputs_folder() / "sweeps"
    found = find_orphans(tracker, sweeps) if dry_run else close_orphans(tracker, sweeps)
    _print_findings(found)
    counts = Counter(finding.fate for finding in found)
    said = ", ".join(f"{counts[fate]} {fate.value}" for fate in Fate if counts[fate])
    print(f"{'would be' if dry_run else 'open runs'}: {said}" if found else "no run is open")


def _print_findings(found: "list[Finding]") -> None:
    for finding in found:
        print(f"{finding.role} {finding.name} ({finding.run_id}): {finding.fate.value}: {finding.why}")


def ui_command(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Another is taken where this one is in use.")] = 5000,
    experiment: StoreExperiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Start the MLflow UI and print the address of the newest sweep's comparison; Ctrl-C ends it."""
    from ladezeit.redaction import without_credentials
    from ladezeit.tracking.ui import serve_ui

    store = _existing(experiment, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None)
    if store.uri.startswith("http"):
        print(_pages(store, without_credentials(store.uri).rstrip("/")))
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with serve_ui(store.uri, port) as (address, process):
            print(_pages(store, address), flush=True)
            print("Ctrl-C ends it", flush=True)
            process.wait()
        raise TrackingError("MLflow's interface ended by itself")
    except KeyboardInterrupt:
        print("ended")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _existing(experiment: str, uri: str | None) -> "Store":
    """Return the store with its experiment; looking at it must create neither."""
    from ladezeit.tracking.reader import get_experiment, open_existing
    from ladezeit.tracking.store import DATABASE_FILE, Store, report_errors, sqlite_file

    uri = uri or f"sqlite:///{outputs_folder() / DATABASE_FILE}"
    client, database = open_existing(uri), sqlite_file(uri)
    with report_errors("opening the store"):
        found = get_experiment(client, experiment, database)
    return Store(client, uri, found.experiment_id, database)


def _pages(store: "Store", base: str) -> str:
    """Return the lines that say where to look: at the newest sweep, or at the experiment where it has none."""
    from ladezeit.tracking import mlflow_tracker, projection
    from ladezeit.tracking.store import report_errors
    from ladezeit.tracking.views import list_pages, sweep_pages

    with report_errors("looking for the newest sweep"):
        newest = mlflow_tracker.newest_sweep(store)
        saved = store.client.get_experiment(store.experiment_id).tags
    if newest is None:
        return f"MLflow: {base}/#/experiments/{store.experiment_id}/runs (no sweep yet)"
    sweep = newest.data.tags[projection.SWEEP_TAG]
    return f"newest sweep, {newest.info.run_name} ({sweep}):\n{list_pages(sweep_pages(store, sweep, base, saved))}"
