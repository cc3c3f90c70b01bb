"""Where a person finds a sweep or a run in MLflow's interface."""

import os
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from urllib.parse import quote

from ladezeit.result import SweepRecord
from ladezeit.tracking import views
from ladezeit.tracking.credentials import redact, without_credentials
from ladezeit.tracking.store import DATABASE_FILE, Store

LOCAL_PORT = 5000
_CHARTS = "workflowType=machine_learning&compareRunsMode=CHART"


def address(store: Store, of: SweepRecord | str | None, *, views_saved: Collection[str]) -> str:
    """Return the lines to print: for a database the command that starts the interface, then the pages to open.

    `of` is a sweep (its comparison), a run's id (that run) or None (the experiment); `views_saved` are the keys of the
    experiment's tags.
    """
    is_server = store.uri.startswith("http")
    base = without_credentials(store.uri).rstrip("/") if is_server else f"http://127.0.0.1:{LOCAL_PORT}"
    if isinstance(of, SweepRecord):
        found = sweep_pages(store, of.id, base, views_saved)
    elif of is None:
        found = {"experiment": f"{base}/#/experiments/{store.experiment_id}/runs?{_CHARTS}"}
    else:
        found = {"run": f"{base}/#/experiments/{store.experiment_id}/runs/{of}?workflowType=machine_learning"}
    start = "" if is_server else f" start\n  {ui_command(store)}\nand open"
    return f"compare in MLflow:{start}\n{listed(found)}"


def listed(pages: dict[str, str]) -> str:
    """Return pages as lines, one a page, its title first."""
    width = max(map(len, pages))
    return "\n".join(f"  {title:<{width}}  {page}" for title, page in pages.items())


def sweep_pages(store: Store, sweep_id: str, base: str, views_saved: Collection[str]) -> dict[str, str]:
    """Return the pages of a sweep below the interface's address `base`, by title; without its views, a search."""
    runs = f"{base}/#/experiments/{store.experiment_id}/runs?"
    if views.tag_key(sweep_id) not in views_saved:
        return {"charts": f"{runs}searchFilter={quote(views.sample_condition(sweep_id))}&{_CHARTS}"}
    every = f"{runs}viewStateShareKey={views.share_key(sweep_id)}"
    pages = {"charts": f"{every}&{_CHARTS}", "table": f"{every}&workflowType=machine_learning"}
    if views.tag_key(sweep_id, views.AVERAGES) in views_saved:
        averages = f"{runs}viewStateShareKey={views.share_key(sweep_id, views.AVERAGES)}"
        pages["averages"] = f"{averages}&workflowType=machine_learning"
    return pages


def ui_command(store: Store) -> str:
    """Return the shell command that serves the store's interface on this machine alone."""
    own = Path(sys.executable).parent / "ladezeit-results"
    program = str(own) if own.exists() and shutil.which("ladezeit-results") != str(own) else "ladezeit-results"
    default = Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute() / DATABASE_FILE
    if store.database == default and "MLFLOW_TRACKING_URI" not in os.environ:
        return f"{shlex.quote(program)} ui"
    return f"{shlex.quote(program)} ui --tracking-uri {shlex.quote(redact(store.uri))}"
