"""Results as MLflow runs: a projection of the files on disk that can be rebuilt from them at any time."""

from ladezeit.tracking.mlflow_tracker import MARKER
from ladezeit.tracking.open import open_tracker
from ladezeit.tracking.tracker import SweepStatus, Tracker

__all__ = ["MARKER", "SweepStatus", "Tracker", "open_tracker"]
