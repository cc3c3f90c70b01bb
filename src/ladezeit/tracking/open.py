"""From the option group `tracking` to a tracker."""

import os
from pathlib import Path

from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.errors import TrackingError
from ladezeit.tracking.store import check_reachable
from ladezeit.tracking.tracker import Tracker


def open_tracker(tracking: TrackingConfig, outputs: Path) -> Tracker:
    """Open the store that `tracking` names; `outputs` is where the sqlite store and its artifacts lie.

    Raises:
        TrackingError: there is no address, nothing answers there within seconds, or the store refuses.
    """
    if tracking.kind is TrackingKind.none:
        return Tracker()
    from ladezeit.tracking.mlflow_tracker import MlflowTracker
    from ladezeit.tracking.store import open_remote, open_sqlite

    if tracking.kind is TrackingKind.sqlite:
        return MlflowTracker(open_sqlite(outputs, tracking.experiment, tracking.uri))
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise TrackingError(
            "tracking=server needs an address: set MLFLOW_TRACKING_URI=http://host:5000 (or tracking.uri), "
            "or use tracking=sqlite, which needs none"
        )
    check_reachable(uri)
    return MlflowTracker(open_remote(uri, tracking.experiment, outputs))
