"""Real parts to test against: a sqlite store, an MLflow server, a PostgreSQL server, a browser."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # example_results

from real_parts import PASSWORD, free_port, mlflow_server, running

from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.tracking import open_tracker
from required_parts import require


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> Path:
    """The outputs folder that tests with a sqlite store share."""
    return with_store(tmp_path_factory.mktemp("outputs with blank"))


@pytest.fixture
def tracker(outputs: Path, request: pytest.FixtureRequest) -> Any:
    """A tracker on the shared sqlite store, with an experiment of the test's own."""
    return open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment=request.node.nodeid[-200:]), outputs)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> Iterator[str]:
    """The address of an MLflow server on sqlite."""
    folder = with_store(tmp_path_factory.mktemp("server"))
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as (address, _):
        yield address


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URI of an empty database on a PostgreSQL server of the tests' own, with a password in it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    program = Path(shutil.which("postgres") or (found[-1] if found else ""))
    require(program.name, "PostgreSQL is not installed (postgres is neither on the path nor in /usr/lib/postgresql)")
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="ladezeit-postgres-"))
    try:
        with _postgres_server(program.parent, folder) as uri:
            yield uri
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _postgres_server(programs: Path, folder: Path) -> Iterator[str]:
    import psycopg

    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    (folder / "password").write_text(PASSWORD)
    if as_user:  # the server refuses to run as root
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    data = folder / "data"
    options = ["--username=ladezeit", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync"]
    initialize = [*as_user, str(programs / "initdb"), "-D", str(data), "--encoding=UTF8", "--locale=C", *options]
    subprocess.run(initialize, check=True, capture_output=True, cwd="/")
    port = free_port()
    uri = f"postgresql://ladezeit:{PASSWORD}@127.0.0.1:{port}/postgres"

    def ready() -> bool:
        try:
            psycopg.connect(uri, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    command = [*as_user, str(programs / "postgres"), "-D", str(data), "-k", str(folder), "-p", str(port)]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    with running(command, ready, folder / "server.log"):
        yield uri


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright."""
    program = shutil.which("chromium")
    require(program, "chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=program, args=flags)
        yield launched
        launched.close()
