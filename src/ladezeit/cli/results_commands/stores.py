"""Which MLflow store the commands write to or show: options that they share, and how it is opened."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ladezeit.tracking.mlflow_tracker import MlflowTracker

Experiment = Annotated[str, typer.Option(help="The MLflow experiment.")]
TrackingUri = Annotated[
    str | None, typer.Option(help="The MLflow store. Default: $MLFLOW_TRACKING_URI, or outputs/mlflow.db.")
]

DEFAULT_EXPERIMENT = "ladezeit"


def outputs_folder() -> Path:
    """Return the outputs folder: $LADEZEIT_OUTPUTS, or ``outputs_folder`` here."""
    return Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute()


def open_store(experiment: str, uri: str | None) -> "MlflowTracker":
    """Open the store that the options name, creating a sqlite file that is not there yet.

    Raises:
        TrackingError: nothing answers there, or it is no store.
    """
    from ladezeit.config import TrackingConfig, TrackingKind
    from ladezeit.tracking import open_tracker
    from ladezeit.tracking.mlflow_tracker import MlflowTracker

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    kind = TrackingKind.sqlite if uri is None or uri.startswith("sqlite:") else TrackingKind.server
    tracker = open_tracker(TrackingConfig(kind=kind, uri=uri, experiment=experiment), outputs_folder())
    assert isinstance(tracker, MlflowTracker)
    return tracker
