"""`ladezeit-results ui`: MLflow's interface on everything measured, opened where the newest sweep is compared."""

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladezeit.cli.results_commands.stores import DEFAULT_EXPERIMENT, Experiment, TrackingUri, outputs_folder
from ladezeit.errors import TrackingError, did_you_mean

if TYPE_CHECKING:
    from ladezeit.tracking.store import Store


def ui_command(
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Another is taken where this one is in use.")] = 5000,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
) -> None:
    """Start the MLflow UI and print the address of the newest sweep's comparison; Ctrl-C ends it."""
    from ladezeit.results.redaction import without_credentials
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
    from ladezeit.tracking.store import DATABASE_FILE, Store, check_reachable, client_class, report_errors
    from ladezeit.tracking.ui import sqlite_file

    uri = uri or f"sqlite:///{outputs_folder() / DATABASE_FILE}"
    database = sqlite_file(uri)
    if database is None:
        check_reachable(uri)
    elif not database.is_file():
        raise TrackingError(
            f"there is no store at {database}: measure something first (ladezeit model=tiny), bring results in "
            f"(ladezeit-results sync FOLDER), or give --tracking-uri"
        )
    with report_errors("opening the store"):
        client: Any = client_class()(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(known.name for known in client.search_experiments())
            near = did_you_mean(experiment, names)
            raise TrackingError(f"there is no experiment '{experiment}' here: it has {', '.join(names)}.{near}")
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
