"""Samples from an MLflow experiment: each run's ``result.json``, or what its tags and metrics still tell."""

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ladezeit.errors import LadezeitError, TrackingError, did_you_mean
from ladezeit.results.reader import Samples, check_any, read_paths
from ladezeit.results.records import FILE_NAME, Identity, Result, Status

_PAGE = 1000
_DOWNLOADS_AT_ONCE = 16
_RUNNING = ("RUNNING", "SCHEDULED")
_SELECTION = "tags.`ladezeit.role` = 'sample'"

_SQLITE = "sqlite:///"
_QUERY = """
    SELECT runs.run_uuid, runs.status, runs.artifact_uri FROM runs
    JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = 'ladezeit.role' AND tags.value = 'sample'
    WHERE runs.experiment_id = ? AND runs.lifecycle_stage = 'active'
"""

_RUN_ID = re.compile(r"[0-9a-f]{32}")


class _Run(NamedTuple):
    """What has to be known of a run to read it."""

    run_id: str
    status: str
    artifact_uri: str


def read_experiment(name: str, uri: str | None = None, *, with_profiled: bool = False) -> Samples:
    """Read all samples of the experiment `name`.

    Args:
        name: the experiment's name, as in `tracking.experiment`.
        uri: the store's address; None takes $MLFLOW_TRACKING_URI, then ``outputs/mlflow.db``.
        with_profiled: take samples that a profiler looked at too.

    Raises:
        LadezeitError: there is no such store or experiment, or it holds no sample.
    """
    from ladezeit.tracking.store import report_errors

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_store()
    client = _open(uri)
    with report_errors(f"reading the experiment '{name}'"):
        found = client.get_experiment_by_name(name)
        if found is None:
            names = sorted(experiment.name for experiment in client.search_experiments())
            raise TrackingError(
                f"there is no experiment '{name}' in this store: it has {', '.join(names)}." + did_you_mean(name, names)
            )
        samples = _read_runs(client, _runs(client, uri, found.experiment_id), with_profiled)
    check_any(samples, f"the experiment '{name}'")
    return samples


def read_run(run_id: str, uri: str | None = None) -> Samples:
    """Read the samples of one MLflow run: all of a sweep's own run, or the sample that the run is.

    Raises:
        LadezeitError: there is no such store or run, or it holds no sample.
    """
    from ladezeit.tracking.store import report_errors

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_store()
    client = _open(uri)
    with report_errors(f"reading the run {run_id}"):
        run = client.get_run(run_id)
        own = [_Run(run_id, run.info.status, run.info.artifact_uri)]
        if run.data.tags.get("ladezeit.role") == "sweep":
            of_sweep = f"{_SELECTION} and tags.`mlflow.parentRunId` = '{run_id}'"
            own = list(_asked_for_runs(client, run.info.experiment_id, of_sweep))
        samples = _read_runs(client, own)
    check_any(samples, f"the run {run_id}")
    return samples


def _local_store() -> str:
    folder = Path(os.environ.get("LADEZEIT_OUTPUTS", "outputs")).absolute()
    return f"sqlite:///{folder / 'mlflow.db'}"


def _open(uri: str) -> Any:
    from ladezeit.tracking.store import check_reachable, client_class, report_errors

    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        if not database.is_file():
            raise TrackingError(
                f"there is no store at {database}: give --tracking-uri sqlite:////absolute/path/mlflow.db or "
                f"http://host:5000, or the folder of a sweep instead of --experiment"
            )
    else:
        check_reachable(uri)
    with report_errors("opening the store"):
        return client_class()(uri)


def _runs(client: Any, uri: str, experiment_id: str) -> list[_Run]:
    """Return the experiment's samples; a sqlite store is asked directly, which takes a hundredth of MLflow's time."""
    if uri.startswith(_SQLITE):
        try:
            with closing(sqlite3.connect(f"{Path(uri.removeprefix(_SQLITE)).as_uri()}?mode=ro", uri=True)) as store:
                return [_Run(*row) for row in store.execute(_QUERY, (experiment_id,))]
        except sqlite3.Error:  # another schema than the one that is known: MLflow knows its own
            pass
    return list(_asked_for_runs(client, experiment_id))


def _asked_for_runs(client: Any, experiment_id: str, selection: str = _SELECTION) -> Iterator[_Run]:
    token = None
    while True:
        page = client.search_runs([experiment_id], selection, max_results=_PAGE, page_token=token)
        yield from (_Run(run.info.run_id, run.info.status, run.info.artifact_uri) for run in page)
        token = page.token
        if not token:
            return


def _read_runs(client: Any, runs: Sequence[_Run], with_profiled: bool = False) -> Samples:
    samples = Samples(with_profiled=with_profiled)
    seen: set[tuple[object, ...]] = set()
    done = [run for run in runs if run.status not in _RUNNING]
    for run in runs:
        if run.status in _RUNNING:
            samples.left_out.append(f"run {run.run_id}: still running, or its process died")
    texts: list[str | None]
    with TemporaryDirectory(prefix="ladezeit-") as staging, ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        texts = list(pool.map(lambda run: _artifact(client, run, Path(staging)), done))
    pairs = [(run, _parsed(client, run, text, samples)) for run, text in zip(done, texts, strict=True)]
    known = [(run, result) for run, result in pairs if result is not None]
    for run, result in sorted(known, key=lambda pair: (pair[1].identity.sweep or "", pair[1].identity.job)):
        samples.add_result(result, f"run {run.run_id}", seen)
    return samples


def _artifact(client: Any, run: _Run, staging: Path) -> str | None:
    """Return the text of the run's ``result.json``, None where there is none; local stores are read directly."""
    address = urlsplit(run.artifact_uri)
    try:
        if address.scheme in ("", "file"):
            return (Path(unquote(address.path)) / FILE_NAME).read_text(encoding="utf-8")
        own = staging / run.run_id
        own.mkdir()
        return Path(client.download_artifacts(run.run_id, FILE_NAME, str(own))).read_text(encoding="utf-8")
    except Exception:  # whatever a store raises for an artifact that is not there
        return None


def _parsed(client: Any, run: _Run, text: str | None, samples: Samples) -> Result | None:
    """Return the result, from its file or else from the run's tags; a file that is damaged is named."""
    try:
        if text is not None:
            return Result.from_dict(json.loads(text))
        return _from_tags(client.get_run(run.run_id))
    except (LadezeitError, ValueError, KeyError) as cause:
        samples.unreadable.append(f"run {run.run_id}: {' '.join(str(cause).split())}")
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
