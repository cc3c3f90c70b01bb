"""Samples from an MLflow experiment: each run's ``result.json``, or what its tags and metrics still tell."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from ladezeit.errors import LadezeitError, TrackingError, did_you_mean
from ladezeit.results.reader import Samples, check_any, read_paths
from ladezeit.results.records import FILE_NAME, Identity, Result, Status
from ladezeit.system.gc_pause import pause_gc
from ladezeit.tracking import projection
from ladezeit.tracking.store import (
    DATABASE_FILE,
    check_reachable,
    client_class,
    find_experiment,
    report_errors,
    search_runs,
    sqlite_file,
)

_DOWNLOADS_AT_ONCE = 16
_SAMPLES = f"tags.`{projection.ROLE_TAG}` = 'sample'"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def read_experiment(name: str, uri: str | None = None, *, with_profiled: bool = False) -> Samples:
    """Read all samples of the experiment `name`.

    Args:
        name: the experiment's name, as in `tracking.experiment`.
        uri: the store's address; None takes $MLFLOW_TRACKING_URI, then ``outputs/mlflow.db``.
        with_profiled: take samples that a profiler looked at too.

    Raises:
        LadezeitError: there is no such store or experiment, or it holds no sample.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_store()
    client = open_existing(uri)
    with report_errors(f"reading the experiment '{name}'"):
        found = get_experiment(client, name, sqlite_file(uri))
        samples = _read_runs(client, search_runs(client, found.experiment_id, _SAMPLES), with_profiled)
    check_any(samples, f"the experiment '{name}'")
    return samples


def read_run(run_id: str, uri: str | None = None) -> Samples:
    """Read the samples of one MLflow run: all of a sweep's own run, or the sample that the run is.

    Raises:
        LadezeitError: there is no such store or run, or it holds no sample.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_store()
    client = open_existing(uri)
    with report_errors(f"reading the run {run_id}"):
        run = client.get_run(run_id)
        own = [run]
        if run.data.tags.get(projection.ROLE_TAG) == "sweep":
            of_sweep = f"{_SAMPLES} and tags.`{projection.PARENT_TAG}` = '{run_id}'"
            own = search_runs(client, run.info.experiment_id, of_sweep)
        samples = _read_runs(client, own)
    check_any(samples, f"the run {run_id}")
    return samples


def _local_store() -> str:
    folder = Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute()
    return f"sqlite:///{folder / DATABASE_FILE}"


def open_existing(uri: str) -> Any:
    """Return MLflow's client of a store that is there; looking at it must not create it.

    Raises:
        TrackingError: there is no such file, or nothing answers at the address.
    """
    database = sqlite_file(uri)
    if database is None:
        check_reachable(uri)
    elif not database.is_file():
        raise TrackingError(
            f"there is no store at {database}: measure something first (ladezeit model=tiny), bring results in "
            f"(ladezeit-results sync FOLDER), or give --tracking-uri sqlite:////absolute/path/mlflow.db or "
            f"http://host:5000"
        )
    with report_errors("opening the store"):
        return client_class()(uri)


def get_experiment(client: Any, name: str, database: Path | None) -> Any:
    """Return the experiment that runs go to (`find_experiment`), or else the one called `name`.

    Raises:
        TrackingError: there is none; the text names those that there are.
    """
    found = find_experiment(client, name, database)[1] or client.get_experiment_by_name(name)
    if found is None:
        names = sorted(experiment.name for experiment in client.search_experiments())
        near = did_you_mean(name, names)
        raise TrackingError(f"there is no experiment '{name}' in this store: it has {', '.join(names)}.{near}")
    return found


def _read_runs(client: Any, runs: Sequence[Any], with_profiled: bool = False) -> Samples:
    samples = Samples(with_profiled=with_profiled)
    seen: set[tuple[object, ...]] = set()
    done = []
    for run in runs:
        if run.info.status in ("RUNNING", "SCHEDULED"):
            samples.left_out.append(f"run {run.info.run_id}: still running, or its process died")
        else:
            done.append(run)
    texts: list[str | None]
    with TemporaryDirectory(prefix="ladezeit-") as staging, ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        texts = list(pool.map(lambda run: _artifact(client, run.info, Path(staging)), done))
    with pause_gc():
        pairs = [(run.info.run_id, _parsed(run, text, samples)) for run, text in zip(done, texts, strict=True)]
    known = [(run_id, result) for run_id, result in pairs if result is not None]
    for run_id, result in sorted(known, key=lambda pair: (pair[1].identity.sweep or "", pair[1].identity.job)):
        samples.add_result(result, f"run {run_id}", seen)
    return samples


def _artifact(client: Any, info: Any, staging: Path) -> str | None:
    """Return the text of the run's ``result.json``, None where there is none; local stores are read directly."""
    address = urlsplit(info.artifact_uri)
    try:
        if address.scheme in ("", "file"):
            return (Path(unquote(address.path)) / FILE_NAME).read_text(encoding="utf-8")
        own = staging / info.run_id
        own.mkdir()
        return Path(client.download_artifacts(info.run_id, FILE_NAME, str(own))).read_text(encoding="utf-8")
    except Exception:  # whatever a store raises for an artifact that is not there
        return None


def _parsed(run: Any, text: str | None, samples: Samples) -> Result | None:
    """Return the result, from its file or else from the run's tags; a file that is damaged is named."""
    try:
        if text is not None:
            return Result.from_dict(json.loads(text))
        return _from_tags(run)
    except (LadezeitError, ValueError, KeyError) as cause:
        samples.unreadable.append(f"run {run.info.run_id}: {' '.join(str(cause).split())}")
        return None


def _from_tags(run: Any) -> Result:
    """Rebuild what a comparison needs from the run itself; phases and the full config are lost with the artifact."""
    tags, params = run.data.tags, run.data.params
    return Result(
        status=Status(tags["ladezeit.status"]),
        reason=tags.get("ladezeit.reason"),
        identity=Identity(
            point=tags["ladezeit.point"],
            sample=int(params.get("sample", 0)),
            job=int(tags.get("ladezeit.sweep.job", 0)),
            label=run.info.run_name or "",
            overrides=[f"{key}={value}" for key, value in params.items()],
            command=tags.get("ladezeit.command", ""),
            sweep=tags.get("ladezeit.sweep"),
        ),
        config=_unflattened(tags, "config."),
        effective=_unflattened(tags, "effective."),
        metrics=dict(run.data.metrics),
        proof=_unflattened(tags, "proof.") or None,
        environment=_unflattened(tags, "environment."),
        started_at=str(run.info.start_time),
    )


def _unflattened(tags: Mapping[str, str], prefix: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, text in tags.items():
        if key.startswith(prefix):
            *path, last = key.removeprefix(prefix).split(".")
            node = tree
            for part in path:
                node = node.setdefault(part, {}) if isinstance(node.get(part, {}), dict) else {}
            node[last] = _value(text)
    return tree


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# What results are held against: a sweep's folder, a result file, an MLflow run, or an MLflow experiment.


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

    try:
        return read_run(source, uri) if _RUN_ID.fullmatch(source) else read_experiment(source, uri)
    except LadezeitError as cause:
        raise LadezeitError(f"--baseline {source} is no path here, and as an MLflow name: {cause}") from None


def exclude_samples(baseline: Samples, new: Samples) -> Samples:
    """Return the baseline without the samples that are to be checked: an experiment often holds both.

    Raises:
        LadezeitError: nothing is left.
    """
    known = {_sample_of(result) for result in new.results}
    kept = [index for index, result in enumerate(baseline.results) if _sample_of(result) not in known]
    if not kept:
        raise LadezeitError("the baseline holds the new results and nothing else: name an older sweep or run")
    return replace(
        baseline,
        results=[baseline.results[index] for index in kept],
        places=[baseline.places[index] for index in kept],
        missing=0,
    )


def _sample_of(result: Result) -> tuple[object, ...]:
    known = result.identity
    return known.sweep, known.job, known.point, result.started_at
