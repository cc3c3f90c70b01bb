"""MLflow's store: opened so that it cannot be destroyed by it, and asked so that it cannot hang or print."""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass, urlopen

from ladezeit.errors import TrackingError
from ladezeit.redaction import redact_text, without_credentials
from ladezeit.system.files import hold_lock
from ladezeit.system.gc_pause import pause_gc

DATABASE_FILE = "mlflow.db"
ARTIFACTS_FOLDER = "artifacts"
_LOCK_FILE = ".mlflow.lock"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"

#: MLflow's own defaults let one call to a dead server take minutes; its telemetry thread races with `os.environ`.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    _RETRIES: "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_MOST_CAUSE = 400
_PAGE = 1000

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 3.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class Store:
    """An open store: MLflow's client, its address and the experiment that everything goes to.

    `database` is the sqlite file, None for a server; `uri` may hold credentials and is never printed. `mlflow_version`
    is that of the MLflow whose interface shows the store.
    """

    client: Any
    uri: str
    experiment_id: str
    database: Path | None = None
    mlflow_version: str = ""

    def search_runs(self, condition: str, *, with_deleted: bool = False) -> list[Any]:
        """Return all runs of the experiment that meet MLflow's filter `condition`; raises whatever MLflow raises."""
        return search_runs(self.client, self.experiment_id, condition, with_deleted=with_deleted)

    def create_run(self, **arguments: Any) -> Any:
        """Create a run, in one attempt: MLflow would repeat a request whose answer was lost, and make a second run."""
        with _one_attempt:
            before = os.environ.get(_RETRIES)
            os.environ[_RETRIES] = "0"  # read anew for each request, and there is no argument for it
            try:
                return self.client.create_run(self.experiment_id, **arguments)
            finally:
                if before is None:
                    del os.environ[_RETRIES]
                else:
                    os.environ[_RETRIES] = before


_one_attempt = threading.Lock()


def search_runs(client: Any, experiment_id: str, condition: str, *, with_deleted: bool = False) -> list[Any]:
    """Return all runs of an experiment that meet MLflow's filter `condition`; raises whatever MLflow raises."""
    from mlflow.entities import ViewType

    view = ViewType.ALL if with_deleted else ViewType.ACTIVE_ONLY
    runs: list[Any] = []
    token = None
    with pause_gc():  # a run is some hundred objects without a cycle: looking for one takes three times as long
        while True:
            page = client.search_runs([experiment_id], condition, view, max_results=_PAGE, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs


def client_class() -> Any:
    """Return MLflow's client; importing MLflow (1.5 s) happens here and nowhere else.

    Making an instance for a database creates and migrates it at once.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # What MLflow logs with a trace it also raises, and what it raises is told as a `TrackingError`.
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient


@contextmanager
def report_errors(doing: str) -> Iterator[None]:
    """Turn whatever MLflow raises into a `TrackingError` that says what was being done, without any credentials."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as cause:
        raise TrackingError(f"MLflow: {doing} failed: {_explained(cause)}") from None


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_sqlite(outputs: Path, experiment: str, uri: str | None) -> Store:
    """Open ``outputs/mlflow.db`` (or the file that `uri` names), creating it and the experiment once for all processes.

    In a copied outputs folder, runs go to an experiment of the copy's own (`find_experiment`).

    Raises:
        TrackingError: the file is no store, another MLflow version's, or the experiment is a server's.
    """
    outputs = outputs.absolute()
    database = outputs / DATABASE_FILE if uri is None else _database_of(uri)
    _check_path(database)
    database.parent.mkdir(parents=True, exist_ok=True)
    artifacts = (database.parent / ARTIFACTS_FOLDER).as_uri()
    with report_errors(f"opening {database}"):
        open_client = client_class()
        with hold_lock(database.parent / _LOCK_FILE):
            if not database.exists():
                _create(database)
            client = open_client(f"sqlite:///{database}")
            name, found = find_experiment(client, experiment, database)
            if found is None:
                experiment_id = client.create_experiment(name, artifact_location=artifacts)
            else:
                experiment_id = found.experiment_id
                _check_experiment(found, database)
    if name != experiment:
        _log.warning(
            "%s was copied or moved: the experiment '%s' keeps its artifacts in another folder, so runs go to '%s'",
            database,
            experiment,
            name,
        )
    return Store(client, f"sqlite:///{database}", experiment_id, database, version("mlflow"))


def find_experiment(client: Any, name: str, database: Path | None) -> tuple[str, Any]:
    """Return the experiment that runs go to, None where it is missing, and its name.

    It is the one called `name`; but MLflow keeps an experiment's artifacts where it was made for good. In a sqlite
    file that was copied or moved with its folder, the folder has an experiment of its own, ``<name> in <folder>``, so
    that nothing is written into the original.
    """
    found = client.get_experiment_by_name(name)
    if found is None or database is None or not _is_elsewhere(str(found.artifact_location), database):
        return name, found
    name = f"{name} in {database.parent.absolute()}"
    return name, client.get_experiment_by_name(name)


def _is_elsewhere(location: str, database: Path) -> bool:
    """Say whether an experiment's artifacts belong to another outputs folder, which is there or not."""
    folder = Path(unquote(location.removeprefix("file://")))
    if not folder.is_absolute() or folder.resolve() == (database.parent / ARTIFACTS_FOLDER).resolve():
        return False
    # A person may have chosen any folder for artifacts: one that is there, and beside no other store.
    return not folder.parent.is_dir() or (folder.parent / database.name).is_file()


def open_remote(uri: str, experiment: str, outputs: Path) -> Store:
    """Open the store behind a server's address, or a database's; its experiment is created where it is missing.

    Raises:
        TrackingError: nothing answers there within seconds, or it refuses.
    """
    with report_errors(f"opening {redact_text(uri)}"):
        client = client_class()(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            # A server knows where its artifacts belong; a bare database does not.
            artifacts = None if uri.startswith("http") else (outputs.absolute() / ARTIFACTS_FOLDER).as_uri()
            experiment_id = _create_experiment(client, experiment, artifacts)
        else:
            _check_experiment(found, None)
            experiment_id = found.experiment_id
    return Store(client, uri, experiment_id, None, served_version(uri))


def served_version(uri: str) -> str:
    """Return the version of the MLflow that shows the store at `uri`: its server's, else the one installed here."""
    if uri.startswith(("http://", "https://")):
        try:
            with closing(urlopen(f"{without_credentials(uri).rstrip('/')}/version", timeout=_ANSWER_TIMEOUT_S)) as said:
                return str(said.read(100).decode(errors="replace").strip())
        except OSError:  # it wants to know who asks, or is an old one
            pass
    return version("mlflow")


def _create_experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name, artifact_location=artifacts))
    except MlflowException as error:
        # Another process may have been faster: then it is there now.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


def _create(database: Path) -> None:
    """Let MLflow create and migrate a database under another name, so that a half-made one never has the real name."""
    for left in database.parent.glob(f".{database.name}.*"):  # of a process that died here; this one holds the lock
        left.unlink()
    draft = database.with_name(f".{database.name}.{os.getpid()}")
    try:
        client_class()(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.replace(database)
    finally:
        draft.unlink(missing_ok=True)


def _database_of(uri: str) -> Path:
    path = sqlite_file(uri)
    if path is None or path == Path():
        raise TrackingError(
            f"tracking.uri={redact_text(uri)} is not a sqlite file: use sqlite:////absolute/path.db, or tracking=server"
        )
    return path.absolute()


def _check_path(database: Path) -> None:
    bad = sorted(set("%?#") & set(str(database)))
    if bad:
        raise TrackingError(
            f"the store would be {database}, but MLflow cannot open a path with {' '.join(bad)} in it: "
            f"choose another outputs folder, or tracking=none"
        )


def _check_experiment(found: Any, database: Path | None) -> None:
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment '{found.name}' was deleted in MLflow: restore it with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or choose another tracking.experiment"
        )
    if database is not None and str(found.artifact_location).startswith("mlflow-artifacts:"):
        raise TrackingError(
            f"the experiment '{found.name}' in {database} was created by a server and takes artifacts "
            f"through it alone: choose another tracking.experiment, or tracking=server"
        )


def _explained(cause: Exception) -> str:
    """Return the cause in a line or two, with what to do where that is known."""
    text = redact_text(" ".join(str(cause).split())) or type(cause).__name__
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        return (
            "the store has the schema of another MLflow version. Use the version that wrote it, or, if this one is "
            "newer, make a copy and run 'mlflow db upgrade <address of the store>'; or choose another outputs folder "
            "and import the results there"
        )
    if "file is not a database" in text or "malformed" in text:
        return f"{text[:_MOST_CAUSE]}. Move the file away: a new one is made, and the results can be imported into it"
    return text[:_MOST_CAUSE] + ("…" if len(text) > _MOST_CAUSE else "")


# Whether anything answers at a store's address, found out in seconds and before MLflow starts to retry.


def check_reachable(uri: str) -> None:
    """Connect to the host of `uri` once, so that a dead server costs seconds and not MLflow's retries.

    Raises:
        TrackingError: the address has no host, or nothing answers there.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.split("+")[0]
    if scheme not in _PORTS:
        if scheme in ("", "file", "sqlite"):
            raise TrackingError(f"tracking.uri={redact_text(uri)} is no server's address: use http://host:5000")
        return
    try:
        host, port = parts.hostname, parts.port or _PORTS[scheme]
    except ValueError:
        host, port = None, 0
    if not host:
        raise TrackingError(f"tracking.uri={redact_text(uri)} names no host: use http://host:5000")
    if scheme in getproxies() and not proxy_bypass(host):
        return  # the way there leads over a proxy: connecting directly would prove nothing
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as cause:
        raise TrackingError(
            f"nothing answers at {redact_text(uri)} ({cause.strerror or cause}): start the server there, correct the "
            f"address, or use tracking=sqlite; tracking=none measures without MLflow"
        ) from None


def check_answers(uri: str) -> None:
    """Ask an MLflow server for its health; one that hangs is found out in three seconds.

    Raises:
        TrackingError: there was no answer at all (any status is one).
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urlopen(f"{without_credentials(uri).rstrip('/')}/health", timeout=_ANSWER_TIMEOUT_S).close()
    except HTTPError:
        return
    except OSError as cause:
        raise TrackingError(
            f"the server at {redact_text(uri)} does not answer ({cause}): it may hang; the results "
            f"can be imported when it does"
        ) from None
