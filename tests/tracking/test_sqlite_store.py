"""The sqlite store: opened by anybody at any time, and never at the price of what is in it."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from example_results import record, result, write_sample
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.errors import TrackingError
from ladezeit.tracking import MARKER, SweepStatus, Tracker, open_tracker
from ladezeit.tracking.reader import read_experiment
from ladezeit.tracking.sync import close_orphans, sync_folder

SQLITE = TrackingConfig(kind=TrackingKind.sqlite)

OPEN = """
import sys
from pathlib import Path
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.tracking import open_tracker
"""

SAMPLES_OF_ONE_PROCESS = (
    OPEN
    + """
sys.path.insert(0, sys.argv[3])
from example_results import result, write_sample
outputs, process = Path(sys.argv[1]), int(sys.argv[2])
tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite), outputs)
for sample in range(3):
    measured = result(sample=sample, job=10 * process + sample, sweep=None)
    folder = write_sample(outputs / f"{process}-{sample}", measured)
    tracker.log_sample(measured, folder, None, ["loading"])
print(tracker.store.experiment_id)
"""
)


def children(count: int, code: str, *arguments: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, arguments[0], str(number), *arguments[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


@pytest.mark.slow
def test_eight_processes_open_a_fresh_store_at_once_and_lose_nothing(tmp_path: Path) -> None:
    """Parallel launchers open the store together: without a lock the first sweep of a new user would destroy it."""
    examples = str(Path(__file__).parents[1])
    processes = children(8, SAMPLES_OF_ONE_PROCESS, str(tmp_path), examples)
    ends = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert [code for _, _, code in ends] == [0] * 8, "\n".join(error for _, error, _ in ends)
    assert len({said for said, _, _ in ends}) == 1, "all runs are in one experiment"
    store = open_tracker(SQLITE, tmp_path).store
    runs = store.client.search_runs([store.experiment_id], max_results=100)
    assert len(runs) == 24
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["load/total_s"] > 0 for run in runs)
    assert [e.name for e in store.client.search_experiments() if e.experiment_id != "0"] == ["ladezeit"]


@pytest.mark.slow
def test_a_process_killed_while_it_creates_the_store_leaves_nothing_broken(tmp_path: Path) -> None:
    """Ctrl-C or an out-of-memory kill in the first seconds must not leave a half-migrated file behind."""
    code = OPEN + "open_tracker(TrackingConfig(kind=TrackingKind.sqlite), Path(sys.argv[1]))"
    (process,) = children(1, code, str(tmp_path))
    while not list(tmp_path.glob(".mlflow.db.*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "mlflow.db").exists()
    measured = result(sweep=None)
    open_tracker(SQLITE, tmp_path).log_sample(measured, write_sample(tmp_path / "0", measured), None, [])
    assert not list(tmp_path.glob(".mlflow.db.*")), "nor anything to clean up"


def test_nothing_is_written_outside_the_outputs_folder(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own default would leave mlflow.db and artifacts wherever a command happens to be started."""
    monkeypatch.chdir(tmp_path)
    tracker = open_tracker(SQLITE, outputs)
    measured = result(sweep=None)
    run_id = tracker.log_sample(measured, write_sample(outputs / "elsewhere", measured), None, ["loading"])
    assert list(tmp_path.iterdir()) == []
    assert (outputs / "artifacts" / run_id / "artifacts" / "result.json").is_file()


def test_a_sample_of_a_lost_store_stays_in_the_outbox(tmp_path: Path, outputs: Path) -> None:
    """A store that is removed in mid-sweep would swallow every later run; instead the sample is kept to be imported."""
    private = tmp_path / "outputs"
    private.mkdir()
    open_tracker(SQLITE, outputs)
    (private / "mlflow.db").write_bytes((outputs / "mlflow.db").read_bytes())
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment="lost"), private)
    sweep = tracker.begin_sweep(record(), tmp_path)
    first, second = result(job=0), result(job=1, sample=1)
    tracker.log_sample(first, write_sample(tmp_path / "0", first), sweep, sweep.varying)
    (private / "mlflow.db").unlink()
    folder = write_sample(tmp_path / "1", second)
    written = (folder / "result.json").read_bytes()
    with pytest.raises(TrackingError, match="is gone"):
        tracker.log_sample(second, folder, sweep, sweep.varying)
    with pytest.raises(TrackingError, match="is gone"):
        tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    assert (folder / "result.json").read_bytes() == written
    assert not (folder / MARKER).exists()
    assert not (private / "mlflow.db").exists(), "no empty store took its place"


def damaged(outputs: Path, sql: str) -> None:
    with sqlite3.connect(outputs / "mlflow.db") as database:
        database.execute(sql)
    database.close()


def test_a_store_of_another_mlflow_version_says_what_to_do(tmp_path: Path, outputs: Path) -> None:
    """A newer MLflow upgrades a store and locks older ones out; its own message speaks of SQL alone."""
    open_tracker(SQLITE, outputs)
    (tmp_path / "mlflow.db").write_bytes((outputs / "mlflow.db").read_bytes())
    damaged(tmp_path, "UPDATE alembic_version SET version_num = 'f00000000000'")
    with pytest.raises(TrackingError, match=r"schema of another MLflow version.*another outputs folder"):
        open_tracker(SQLITE, tmp_path)


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    """A damaged store file ends in one sentence with the cure, not in a stack trace of SQL."""
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be taken for one" * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db.*not a database.*Move the file away"):
        open_tracker(SQLITE, tmp_path)


def test_a_deleted_experiment_is_not_written_to(outputs: Path) -> None:
    """Runs in a deleted experiment are invisible: the message says how to get it back."""
    config = TrackingConfig(kind=TrackingKind.sqlite, experiment="deleted")
    store = open_tracker(config, outputs).store
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore --experiment-id {store.experiment_id}"):
        open_tracker(config, outputs)


@pytest.mark.parametrize("original", ["there", "gone"])
def test_a_copied_outputs_folder_writes_into_the_copy(
    tmp_path: Path, with_store: Callable[[Path], Path], caplog: pytest.LogCaptureFixture, original: str
) -> None:
    """MLflow keeps absolute paths: a copy would fill the original's folder, or one that is not there any more."""
    first = with_store(tmp_path / "original")
    measured = result(sweep=None, sample=0)
    open_tracker(SQLITE, first).log_sample(measured, write_sample(first / "runs" / "0", measured), None, [])
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    before = sorted(str(path) for path in first.rglob("*"))
    if original == "gone":
        shutil.rmtree(first)
    tracker: Any = open_tracker(SQLITE, copy)
    assert f"runs go to 'ladezeit in {copy}'" in caplog.text
    assert sync_folder(copy / "runs" / "0", tracker).written == 1
    newer = result(sweep=None, sample=1, job=1)
    run_id = tracker.log_sample(newer, write_sample(copy / "runs" / "1", newer), None, [])
    assert (copy / "artifacts" / run_id / "artifacts" / "result.json").is_file()
    assert not close_orphans(tracker, copy / "sweeps")
    if original == "there":
        assert sorted(str(path) for path in first.rglob("*")) == before
        assert len(read_experiment("ladezeit", f"sqlite:///{first}/mlflow.db").results) == 1
    else:
        assert not first.exists()
    assert len(read_experiment("ladezeit", f"sqlite:///{copy}/mlflow.db").results) == 2
    assert open_tracker(SQLITE, copy).store.experiment_id == tracker.store.experiment_id  # type: ignore[attr-defined]


def test_artifacts_that_a_person_put_elsewhere_stay_there(outputs: Path, tmp_path: Path) -> None:
    """An experiment that was made with a folder of its own for artifacts is no copy."""
    store: Any = open_tracker(SQLITE, outputs).store  # type: ignore[attr-defined]
    (tmp_path / "large disk").mkdir()
    made = store.client.create_experiment("chosen", artifact_location=(tmp_path / "large disk" / "runs").as_uri())
    opened: Any = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment="chosen"), outputs)
    assert opened.store.experiment_id == made


def test_an_experiment_made_by_a_server_is_refused(outputs: Path) -> None:
    """Its artifacts go through that server alone: every run would fail halfway."""
    config = TrackingConfig(kind=TrackingKind.sqlite, experiment="served")
    open_tracker(config, outputs)
    damaged(outputs, "UPDATE experiments SET artifact_location = 'mlflow-artifacts:/7' WHERE name = 'served'")
    with pytest.raises(TrackingError, match="created by a server"):
        open_tracker(config, outputs)


@pytest.mark.parametrize("name", ["100%", "what?", "no#1"])
def test_a_path_that_mlflow_cannot_open_is_refused(tmp_path: Path, name: str) -> None:
    """MLflow would write into another file than the one that was named, and nobody would find the runs."""
    with pytest.raises(TrackingError, match="choose another outputs folder"):
        open_tracker(SQLITE, tmp_path / name)


def test_a_uri_that_is_no_sqlite_file_is_refused(tmp_path: Path) -> None:
    """`tracking=sqlite tracking.uri=http://…` says what to write instead, and keeps the password to itself."""
    config = TrackingConfig(kind=TrackingKind.sqlite, uri="http://me:pw@host:5000")
    with pytest.raises(TrackingError, match=r"http://\*\*\*@host:5000 is not a sqlite file"):
        open_tracker(config, tmp_path)


def test_another_sqlite_file_can_be_named(outputs: Path, tmp_path: Path) -> None:
    """`tracking.uri=sqlite:////shared/runs.db` collects several outputs folders in one store."""
    open_tracker(SQLITE, outputs)
    config = TrackingConfig(kind=TrackingKind.sqlite, uri=f"sqlite:///{outputs}/mlflow.db")
    assert open_tracker(config, tmp_path).store.database == outputs / "mlflow.db"  # type: ignore[attr-defined]


def test_without_tracking_nothing_but_the_record_is_written(tmp_path: Path) -> None:
    """`tracking=none` measures without MLflow, and the results can still be imported later."""
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.none), tmp_path)
    assert type(tracker) is Tracker
    sweep = tracker.begin_sweep(record(), tmp_path)
    folder = write_sample(tmp_path / "0", result())
    assert tracker.log_sample(result(), folder, sweep, sweep.varying) == ""
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    assert not (folder / MARKER).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "sweep.json"]
    assert "tracking=none" in tracker.comparison_lines(sweep)
