"""A tracking server: found or refused in seconds, and never able to take a measurement with it when it dies."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from real_parts import PASSWORD, end_group, free_port, mlflow_server

from example_results import record, result, write_sample
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.errors import TrackingError
from ladezeit.report.timeline import draw_timeline
from ladezeit.tracking import MARKER, SweepStatus, open_tracker
from ladezeit.tracking.sync import sync_folder

SAMPLES_OF_ONE_PROCESS = """
import sys
from pathlib import Path
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.tracking import open_tracker
sys.path.insert(0, sys.argv[4])
from example_results import result, write_sample
uri, folder, process = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tracker = open_tracker(TrackingConfig(kind=TrackingKind.server, uri=uri, experiment="at once"), folder)
for sample in range(3):
    measured = result(sample=sample, job=10 * process + sample, sweep=None)
    own = write_sample(folder / str(process) / str(sample), measured)
    tracker.log_sample(measured, own, None, ["loading"])
"""


def at(uri: str, experiment: str = "ladezeit") -> TrackingConfig:
    return TrackingConfig(kind=TrackingKind.server, uri=uri, experiment=experiment)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_without_an_address_it_is_said_where_to_put_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tracking=server` alone must not fall back to some other store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI=http://host:5000"):
        open_tracker(TrackingConfig(kind=TrackingKind.server), tmp_path)


@pytest.mark.parametrize("uri", ["runs.db", "file:///tmp/mlruns", "sqlite:////tmp/x.db", "http://", "http://host:port"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, uri: str) -> None:
    """MLflow would take a word for a folder and log there."""
    with pytest.raises(TrackingError, match="use http://host:5000"):
        open_tracker(at(uri), tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_dead_server_is_reported_at_once_without_its_password(tmp_path: Path, scheme: str) -> None:
    """MLflow's own retries would make the first sample wait for minutes, and print the address as it is."""
    uri = f"{scheme}://me:{PASSWORD}@127.0.0.1:{free_port()}/runs"
    with pytest.raises(TrackingError, match="nothing answers at") as raised:
        open_tracker(at(uri), tmp_path)
    assert PASSWORD not in str(raised.value)
    assert raised.value.__cause__ is None, "a chained error would show the address"


@pytest.mark.timeout(60)
def test_a_server_that_hangs_is_given_up(tmp_path: Path, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server behind a dead proxy accepts connections for ever: a sweep must not wait with it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(TrackingError, match="opening http://127"):
        open_tracker(at(silent), tmp_path)


@pytest.mark.slow
def test_a_sweep_goes_to_a_server_with_its_files(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team's server gets the same runs, artifacts and comparison as the local store, and prints its own address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    tracker: Any = open_tracker(TrackingConfig(kind=TrackingKind.server, experiment="whole"), tmp_path)
    sweep = tracker.begin_sweep(record(), tmp_path)
    measured = result()
    folder = write_sample(tmp_path / "0", measured)
    draw_timeline(measured, folder / "timeline.png")
    run_id = tracker.log_sample(measured, folder, sweep, sweep.varying)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "| all |")
    client = tracker.store.client
    assert "timeline.png" in {file.path for file in client.list_artifacts(run_id)}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(sweep.parent_run_id).info.status == "FINISHED"
    assert f"compare in MLflow:\n  charts    {server}/#/experiments/" in tracker.comparison_lines(sweep)
    assert "viewStateShareKey=" in tracker.comparison_lines(sweep)
    assert not (tmp_path / "artifacts").exists(), "the server keeps them"


class _Forgetful(ThreadingHTTPServer):
    """In front of a server: passes everything on, but the answer to the first run that is created gets lost."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarding)
        self.target = target
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created = 0


class _Forwarding(BaseHTTPRequestHandler):
    server: _Forgetful

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        asked = Request(self.server.target + self.path, body or None, headers, method=self.command)
        try:
            with urlopen(asked) as reply:
                status, kind, content = reply.status, reply.headers["Content-Type"], reply.read()
        except HTTPError as error:
            status, kind, content = error.code, error.headers["Content-Type"], error.read()
        if self.path.endswith("/runs/create"):
            self.server.created += 1
            if self.server.created == 1:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        self.send_response(status)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = _forward

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_a_lost_answer_makes_no_second_run(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow repeats a request that was not answered, even one that makes a run: each sample would be there twice."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    measured = result(sweep=None)
    folder = write_sample(tmp_path / "0", measured)
    with _Forgetful(server) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        tracker: Any = open_tracker(at(proxy.address, "lost answer"), tmp_path)
        with pytest.raises(TrackingError, match="logging sample"):
            tracker.log_sample(measured, folder, None, ["loading"])
        assert proxy.created == 1 and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
        assert sync_folder(folder, tracker).written == 1, "the run that was made is found and filled"
        assert proxy.created == 1
        (run,) = tracker.store.client.search_runs([tracker.store.experiment_id])
        proxy.shutdown()
    assert run.info.status == "FINISHED" and run.data.metrics["load/total_s"] > 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_server_that_dies_in_mid_sweep_costs_no_sample(tmp_path: Path, with_store: Callable[[Path], Path]) -> None:
    """The sweep goes on, what could not be logged is imported when the server is back, with the original times."""
    backend = f"sqlite:///{with_store(tmp_path)}/mlflow.db"
    first, second = result(job=0), result(job=1, sample=1)
    with mlflow_server(tmp_path, backend) as (address, process):
        tracker: Any = open_tracker(at(address), tmp_path)
        sweep = tracker.begin_sweep(record(samples_planned=2), tmp_path)
        tracker.log_sample(first, write_sample(tmp_path / "0", first), sweep, sweep.varying)
        end_group(process)
        folder = write_sample(tmp_path / "1", second)
        for _ in range(2):
            with pytest.raises(TrackingError, match="nothing answers"):
                tracker.log_sample(second, folder, sweep, sweep.varying)
        with pytest.raises(TrackingError):
            tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    assert not (folder / MARKER).exists()
    with mlflow_server(tmp_path, backend) as (address, _):
        tracker = open_tracker(at(address), tmp_path)
        assert sync_folder(tmp_path, tracker).written == 1
        parent = tracker.store.client.get_run(sweep.parent_run_id)
        assert parent.info.status == "FINISHED"
        runs = tracker.store.client.search_runs([sweep.experiment_id], "tags.`ladezeit.role` = 'sample'")
        assert sorted(run.data.tags["ladezeit.sweep.job"] for run in runs) == ["0", "1"]
        assert max(run.info.start_time for run in runs) == 1772357600000


@pytest.mark.timeout(120)
def test_a_server_that_begins_to_hang_is_asked_briefly(tracker: Any, tmp_path: Path, silent: str) -> None:
    """After a first failure every further sample costs seconds at most, not MLflow's retries each."""
    from dataclasses import replace

    measured = result(sweep=None)
    folder = write_sample(tmp_path, measured)
    tracker.store = replace(tracker.store, uri=silent, database=None)
    tracker._suspect = True
    with pytest.raises(TrackingError, match="does not answer"):
        tracker.log_sample(measured, folder, None, [])
    assert not (folder / MARKER).exists()


@pytest.mark.postgres
@pytest.mark.slow
def test_a_postgresql_store_keeps_its_password_to_itself(postgres: str, tmp_path: Path) -> None:
    """A team may track straight to its database: the address works, and its password is written nowhere."""
    import psycopg

    tracker: Any = open_tracker(at(postgres, "direct"), tmp_path)
    sweep = tracker.begin_sweep(record(), tmp_path)
    measured = result()
    measured.config["tracking"] = {"kind": "server", "uri": postgres, "experiment": "direct"}
    run_id = tracker.log_sample(measured, write_sample(tmp_path / "0", measured), sweep, sweep.varying)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, f"measured into {postgres}")
    assert tracker.store.client.get_run(run_id).info.status == "FINISHED"
    assert PASSWORD not in tracker.comparison_lines(sweep)
    assert PASSWORD not in (tmp_path / "sweep.json").read_text()
    artifacts = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert artifacts and not [path for path in artifacts if PASSWORD.encode() in path.read_bytes()]
    with psycopg.connect(postgres) as database:
        for table in ("runs", "tags", "params", "experiments", "experiment_tags"):
            rows = database.execute(f"SELECT * FROM {table}").fetchall()  # type: ignore[call-overload]
            assert rows or table == "params"
            assert PASSWORD not in repr(rows)


@pytest.mark.postgres
@pytest.mark.slow
def test_several_processes_share_a_server_on_postgresql(postgres: str, tmp_path: Path) -> None:
    """The usual team's store: sweeps of several machines that begin at once end in one experiment, complete."""
    open_tracker(at(postgres), tmp_path)  # creates the tables; the server would, too
    examples = str(Path(__file__).parents[1])
    with mlflow_server(tmp_path, postgres) as (address, _):
        command = [sys.executable, "-c", SAMPLES_OF_ONE_PROCESS, address, str(tmp_path)]
        ends: list[subprocess.CompletedProcess[str]] = []

        def work(number: int) -> None:
            ends.append(subprocess.run([*command, str(number), examples], capture_output=True, text=True, check=False))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [end.returncode for end in ends] == [0] * 3, "\n".join(end.stderr for end in ends)
        store = open_tracker(at(address, "at once"), tmp_path).store  # type: ignore[attr-defined]
        assert len(store.client.search_runs([store.experiment_id])) == 9
