"""Where a person finds a sweep or a run in MLflow's interface."""

import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import quote

from ladezeit.result import SweepRecord
from ladezeit.tracking import projection, views
from ladezeit.tracking.credentials import redact, without_credentials
from ladezeit.tracking.store import Store

LOCAL_PORT = 5000
_LOCAL = f"http://127.0.0.1:{LOCAL_PORT}"


def address(store: Store, of: SweepRecord | str | None, *, view_saved: bool) -> str:
    """Return the lines to print: for a sqlite store the command that starts the interface, then the page to open.

    `of` is a sweep (its comparison), a run's id (that run) or None (the experiment).
    """
    page = _page(store, of, view_saved)
    if store.uri.startswith("http"):
        return f"compare in MLflow: {without_credentials(store.uri).rstrip('/')}/{page}"
    return f"compare in MLflow: start\n  {ui_command(store)}\nand open\n  {_LOCAL}/{page}"


def ui_command(store: Store, port: int = LOCAL_PORT) -> str:
    """Return the shell command that serves the store's interface on this machine alone, with one light process."""
    own = Path(sys.executable).parent / "mlflow"
    program = str(own) if own.exists() and shutil.which("mlflow") != str(own) else "mlflow"
    return (
        "MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "
        f"{shlex.quote(program)} ui --backend-store-uri {shlex.quote(redact(store.uri))} "
        f"--host 127.0.0.1 --port {port} --workers 1"
    )


def _page(store: Store, of: SweepRecord | str | None, view_saved: bool) -> str:
    experiment = f"#/experiments/{store.experiment_id}"
    if isinstance(of, str):
        return f"{experiment}/runs/{of}?workflowType=machine_learning"
    charts = "workflowType=machine_learning&compareRunsMode=CHART"
    if of is None:
        return f"{experiment}/runs?{charts}"
    if view_saved:
        return f"{experiment}/runs?viewStateShareKey={views.share_key(of.id)}&{charts}"
    condition = quote(f"tags.`{projection.SWEEP_TAG}` = '{projection.sweep_tag(of.id)}'")
    return f"{experiment}/runs?searchFilter={condition}&{charts}"
