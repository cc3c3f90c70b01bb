"""What a store knows already: the run of a sweep or of a sample, and which runs are still open.

Each function raises whatever MLflow raises; callers say what was being done (`ladezeit.tracking.store.reported`).
"""

from typing import Any

from ladezeit.result import Result, SweepRecord
from ladezeit.tracking import projection
from ladezeit.tracking.store import Store

_PAGE = 1000


def parent_of(store: Store, record: SweepRecord) -> Any:
    """Return the sweep's own run, None where there is none."""
    of_sweep = f"tags.`{projection.SWEEP_TAG}` = '{projection.sweep_tag(record.id)}'"
    return _first(store, f"{of_sweep} and tags.`{projection.ROLE_TAG}` = 'sweep'")


def run_of(store: Store, result: Result) -> Any:
    """Return the sample's run, None where there is none."""
    return _first(store, f"tags.`{projection.IDENTITY_TAG}` = '{projection.identity_of(result)}'")


def newest_sweep(store: Store) -> Any:
    """Return the run of the sweep that was started last, None where there is none."""
    return _first(store, f"tags.`{projection.ROLE_TAG}` = 'sweep'", order_by=["attributes.start_time DESC"])


def complete(store: Store, sweep: SweepRecord) -> set[str]:
    """Return the identities (`projection.identity_of`) of the sweep's samples whose runs are closed."""
    found = _all(store, f"tags.`{projection.SWEEP_TAG}` = '{projection.sweep_tag(sweep.id)}'")
    closed = (run for run in found if run.info.status != "RUNNING")
    return {run.data.tags.get(projection.IDENTITY_TAG, "") for run in closed} - {""}


def left_open(store: Store) -> list[Any]:
    """Return ladezeit's runs that are marked as running, those of sweeps before those of samples."""
    found = _all(store, "attributes.status = 'RUNNING'")
    own = [run for run in found if projection.ROLE_TAG in run.data.tags]
    return sorted(own, key=lambda run: (run.data.tags[projection.ROLE_TAG] != "sweep", run.info.start_time))


def _first(store: Store, condition: str, **order: Any) -> Any:
    found = store.client.search_runs([store.experiment_id], condition, max_results=1, **order)
    return found[0] if found else None


def _all(store: Store, condition: str) -> list[Any]:
    runs: list[Any] = []
    token = None
    while True:
        page = store.client.search_runs([store.experiment_id], condition, max_results=_PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs
