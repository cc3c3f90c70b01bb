"""What results are held against: a sweep's folder, a result file, an MLflow run, or an MLflow experiment."""

import re
from collections.abc import Sequence
from pathlib import Path

from ladezeit.errors import LadezeitError
from ladezeit.results.reading import Samples, read_paths

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def read_baseline(source: str, uri: str | None) -> Samples:
    """Read a baseline: a path where there is one, else an MLflow run by its id, else an experiment by its name.

    Args:
        source: what the person typed.
        uri: the MLflow store; None takes $MLFLOW_TRACKING_URI, then ``outputs/mlflow.db``.

    Raises:
        LadezeitError: there is no such thing, or it holds no sample.
    """
    if Path(source).exists():
        return read_paths([Path(source)])
    if "/" in source or source.endswith(".json"):
        raise LadezeitError(f"--baseline {source} does not exist: give a sweep's folder, a result.json, an MLflow run")
    from ladezeit.results.experiment import read_experiment, read_run

    try:
        return read_run(source, uri) if _RUN_ID.fullmatch(source) else read_experiment(source, uri)
    except LadezeitError as cause:
        raise LadezeitError(f"--baseline {source} is no path here, and as an MLflow name: {cause}") from None


def without(baseline: Samples, new: Samples) -> Samples:
    """Return the baseline without the samples that are to be checked: an experiment often holds both.

    Raises:
        LadezeitError: nothing is left.
    """
    known = {(r.identity.sweep, r.identity.job, r.identity.point, r.started_at) for r in new.results}
    kept = _chosen(baseline, known)
    if not kept.results:
        raise LadezeitError("the baseline holds the new results and nothing else: name an older sweep or run")
    return kept


def _chosen(samples: Samples, known: set[tuple[str | None, int, str, str]]) -> Samples:
    kept: Sequence[int] = [
        index
        for index, r in enumerate(samples.results)
        if (r.identity.sweep, r.identity.job, r.identity.point, r.started_at) not in known
    ]
    return Samples(
        results=[samples.results[index] for index in kept],
        places=[samples.places[index] for index in kept],
        sweeps=samples.sweeps,
        unreadable=samples.unreadable,
        left_out=samples.left_out,
    )
