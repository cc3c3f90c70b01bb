"""Results as MLflow runs: a projection of the files on disk that can be rebuilt from them at any time."""

from ladezeit.tracking.base import SweepStatus, Tracker, Untracked
from ladezeit.tracking.opening import open_tracker
from ladezeit.tracking.outbox import import_unlogged, unlogged
from ladezeit.tracking.sample_files import MARKER

__all__ = ["MARKER", "SweepStatus", "Tracker", "Untracked", "import_unlogged", "open_tracker", "unlogged"]
