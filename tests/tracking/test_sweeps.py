"""A sweep in MLflow: its own run, its ready-made comparison, and its way there when the store was away."""

import base64
import json
import logging
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from example_results import record, result, sweep_results, write_sample
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.errors import TrackingError
from ladezeit.redaction import redact_text
from ladezeit.report.sweep_table import sweep_as_markdown
from ladezeit.results.records import SweepRecord
from ladezeit.tracking import MARKER, SweepStatus, open_tracker
from ladezeit.tracking.sync import sync_folder


def run_of(tracker: Any, sweep: SweepRecord) -> Any:
    return tracker.store.client.get_run(sweep.parent_run_id)


def view_of(tracker: Any, sweep: SweepRecord, kind: str = "") -> dict[str, Any]:
    """Return the saved view as MLflow's interface would unpack it."""
    tags = tracker.store.client.get_experiment(tracker.store.experiment_id).tags
    view = json.loads(tags[f"mlflow.sharedViewState.ladezeit-{sweep.id}{kind}"])
    packed = base64.b64decode(view["state"].removeprefix("deflate;"))
    return dict(json.loads(zlib.decompress(packed)), name=view["name"])


def test_a_sweep_is_a_parent_run_from_its_start_to_its_end(tracker: Any, tmp_path: Path) -> None:
    """One run stands for the sweep: running while it runs, then closed with its table as the description."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    assert SweepRecord.read_record(tmp_path) == sweep
    opened = run_of(tracker, sweep)
    assert (opened.info.run_name, opened.info.status) == ("origin_case", "RUNNING")
    assert opened.data.tags["ladezeit.command"] == "ladezeit experiment=origin_case"
    assert opened.data.tags["ladezeit.host"] == "bench-1"
    assert opened.data.tags["mlflow.source.git.commit"] == sweep.git_commit
    assert opened.data.tags["versions.mlflow"]
    results = list(sweep_results(1))
    (tmp_path / "summary.md").write_text("all")
    tracker.end_sweep(sweep, SweepStatus.FINISHED, sweep_as_markdown(results, sweep.varying), [tmp_path / "summary.md"])
    closed = run_of(tracker, sweep)
    assert closed.info.status == "FINISHED"
    assert "legacy_manager" in closed.data.tags["mlflow.note.content"]
    assert "`ladezeit experiment=origin_case`" in closed.data.tags["mlflow.note.content"]
    assert [file.path for file in tracker.store.client.list_artifacts(closed.info.run_id)] == ["summary.md"]


@pytest.mark.parametrize("status", list(SweepStatus))
def test_a_sweep_ends_in_mlflow_as_it_ended(tracker: Any, tmp_path: Path, status: SweepStatus) -> None:
    """Ctrl-C and a crash must not look like a finished sweep, nor like one that runs for ever."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    tracker.end_sweep(sweep, status, "")
    assert run_of(tracker, sweep).info.status == status.value


def test_a_sweep_that_goes_on_keeps_its_parent_run(tracker: Any, tmp_path: Path) -> None:
    """Continuing or importing a sweep must not show it twice."""
    first = tracker.begin_sweep(record(), tmp_path)
    tracker.end_sweep(first, SweepStatus.KILLED, "")
    second = tracker.begin_sweep(record(), tmp_path)
    assert second.parent_run_id == first.parent_run_id
    assert run_of(tracker, second).info.status == "RUNNING"


def test_the_comparison_is_saved_with_the_sweep(tracker: Any, tmp_path: Path) -> None:
    """The printed address opens a page that is filtered, sorted and charted, for the sweep's own samples alone."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    for measured in sweep_results(1):
        folder = write_sample(tmp_path / str(measured.identity.job), measured)
        tracker.log_sample(measured, folder, sweep, sweep.varying)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    view = view_of(tracker, sweep)
    assert view["name"] == "origin_case"
    assert view["orderByKey"] == "metrics.`load/total_s`"
    assert {"params.`cache`", "params.`loading`", "metrics.`load/total_s`"} <= set(view["selectedColumns"])
    bars = {chart["metricKey"] for chart in view["compareRunCharts"] if chart["type"] == "BAR"}
    assert {"load/total_s", "load/module_walk_s", "load/unattributed_s", "memory/gpu_allocated_peak_gib"} <= bars
    (parallel,) = [chart for chart in view["compareRunCharts"] if chart["type"] == "PARALLEL"]
    assert parallel["selectedParams"] == ["cache", "loading"]
    runs = tracker.store.client.search_runs([sweep.experiment_id], view["searchFilter"])
    assert len(runs) == 10, "the parent run is not among them"
    colors = {(run.data.params["cache"], run.data.params["loading"]): run.data.tags["mlflow.runColor"] for run in runs}
    assert len(set(colors.values())) == 10
    assert "DIFFERENCE" in {chart["type"] for chart in view["compareRunCharts"]}
    scatters = [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in view["compareRunCharts"] if c["type"] == "SCATTER"]
    assert ("load/total_s", "memory/gpu_allocated_peak_gib") in scatters


def test_averages_over_the_samples_are_saved_as_a_view_of_their_own(tracker: Any, tmp_path: Path) -> None:
    """One row a point, folded, without the columns and charts that MLflow leaves empty for groups."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    for measured in sweep_results(1):
        folder = write_sample(tmp_path / str(measured.identity.job), measured)
        tracker.log_sample(measured, folder, sweep, sweep.varying)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    view = view_of(tracker, sweep, "-averages")
    assert view["groupBy"] == {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "param", "groupByData": key} for key in ("cache", "loading")],
    }
    assert view["groupsExpanded"]["param.cache.warm,param.loading.cuda_fp16"] is False
    assert view["selectedColumns"] and all(column.startswith("metrics.") for column in view["selectedColumns"])
    assert not {"PARALLEL", "DIFFERENCE"} & {chart["type"] for chart in view["compareRunCharts"]}
    sections = {section["uuid"] for section in view["compareRunSections"]}
    assert sections == {chart["metricSectionId"] for chart in view["compareRunCharts"]}


def test_a_view_that_cannot_be_saved_fails_nothing(
    tracker: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The view's format is undocumented: whatever MLflow says to it, the sweep goes on."""
    many = record()
    many.varying = [f"loading.key_{number**7}" for number in range(4000)]  # more than a tag can hold
    with caplog.at_level(logging.WARNING, "ladezeit"):
        sweep = tracker.begin_sweep(many, tmp_path)
    assert "saved view" in caplog.text
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    assert run_of(tracker, sweep).info.status == "FINISHED"
    assert "viewStateShareKey" not in tracker.comparison_lines(sweep)
    assert "searchFilter=" in tracker.comparison_lines(sweep)


@pytest.mark.parametrize("version", ["3.18.0", "4.0.0rc1", "2.22", ""])
def test_no_view_is_written_for_an_interface_that_may_not_read_it(
    tracker: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """A release that changed the undocumented format could show a broken page: one line, and a search instead."""
    tracker.store = replace(tracker.store, mlflow_version=version)
    with caplog.at_level(logging.WARNING, "ladezeit"):
        sweep = tracker.begin_sweep(record(), tmp_path)
        tracker.end_sweep(sweep, SweepStatus.FINISHED, "")
    assert len(caplog.records) == 1 and "may read another format" in caplog.text
    assert run_of(tracker, sweep).info.status == "FINISHED"
    tags = tracker.store.client.get_experiment(tracker.store.experiment_id).tags
    assert not [tag for tag in tags if "sharedViewState" in tag]
    assert "searchFilter=" in tracker.comparison_lines(sweep)


def test_a_long_summary_is_cut_visibly(tracker: Any, tmp_path: Path) -> None:
    """MLflow shows 8,000 characters of a description; the rest must not vanish unnoticed."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    tracker.end_sweep(sweep, SweepStatus.FINISHED, "| x |\n" * 3000)
    note = run_of(tracker, sweep).data.tags["mlflow.note.content"]
    assert len(note) <= 8000
    assert "… (cut, " in note


def test_samples_of_a_sweep_that_no_store_knew_are_imported_with_their_times(
    tracker: Any, outputs: Path, tmp_path: Path
) -> None:
    """`tracking=none`, or a server that was down all night, costs no measurement: all can be logged later."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    results = list(sweep_results(1))
    record(samples_planned=10).save_record(folder)
    for measured in results:
        write_sample(folder / str(measured.identity.job), measured)
    write_sample(folder / "warm-up", result(sweep=None, job=-1))
    assert sync_folder(folder, tracker).written == 10
    sweep = SweepRecord.read_record(folder)
    client = tracker.store.client
    runs = client.search_runs([tracker.store.experiment_id], "tags.`ladezeit.role` = 'sample'")
    assert len(runs) == 10, "the warm-up is no sample of the sweep"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {sweep.parent_run_id}
    assert max(run.info.start_time for run in runs) == 1772357400000 + 9 * 200_000
    parent = run_of(tracker, sweep)
    assert parent.info.status == "FINISHED"
    assert parent.info.start_time == 1772357400000
    assert parent.info.end_time == max(run.info.end_time for run in runs)
    assert "cuda_fp16" in parent.data.tags["mlflow.note.content"]
    assert sync_folder(folder, tracker).written == 0
    assert not (folder / "warm-up" / MARKER).exists()


def test_a_whole_sweep_can_be_rebuilt_in_another_store(tracker: Any, outputs: Path, tmp_path: Path) -> None:
    """MLflow is a projection: a lost or foreign store is filled again from the files, and nothing is doubled."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    sweep = tracker.begin_sweep(record(samples_planned=5), folder)
    measured = result()
    tracker.log_sample(measured, write_sample(folder / "0", measured), sweep, sweep.varying)
    other: Any = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment=f"{tmp_path}-other"), outputs)
    assert [sync_folder(folder, other).written for _ in range(2)] == [1, 0]
    runs = other.store.client.search_runs([other.store.experiment_id])
    assert sorted(run.data.tags["ladezeit.role"] for run in runs) == ["sample", "sweep"]
    (parent,) = [run for run in runs if run.data.tags["ladezeit.role"] == "sweep"]
    assert parent.info.status == "KILLED", "one sample of five is no finished sweep"


def test_a_single_run_is_imported_too(tracker: Any, tmp_path: Path) -> None:
    """A run outside any sweep has no parent; its overrides are its params."""
    measured = result("device_map_auto", sweep=None)
    write_sample(tmp_path / "run", measured)
    assert sync_folder(tmp_path / "run", tracker).written == 1
    (run,) = tracker.store.client.search_runs([tracker.store.experiment_id])
    assert run.data.params == {"loading": "device_map_auto", "cache": "warm", "sample": "0"}
    assert "mlflow.parentRunId" not in run.data.tags


def test_samples_wait_for_a_sweep_that_could_not_be_opened(tracker: Any, tmp_path: Path) -> None:
    """Where the parent run failed to open, its samples are kept for the import instead of becoming orphans."""
    measured = result()
    folder = write_sample(tmp_path / "0", measured)
    with pytest.raises(TrackingError, match="can be imported"):
        tracker.log_sample(measured, folder, record(), ["loading"])
    assert not (folder / MARKER).exists()


def test_the_printed_command_and_pages_belong_to_the_store(
    tracker: Any, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed at the end can be copied: a command that serves this store, and the pages in it."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    said = tracker.comparison_lines(sweep)
    assert f"ladezeit-results ui --tracking-uri 'sqlite:///{outputs}/mlflow.db'\n" in said
    runs = f"http://127.0.0.1:5000/#/experiments/{sweep.experiment_id}/runs"
    for title, view in (("charts", sweep.id), ("table", sweep.id), ("averages", f"{sweep.id}-averages")):
        (line,) = [line for line in said.splitlines() if line.split()[0] == title]
        assert f"{runs}?viewStateShareKey=ladezeit-{view}&workflowType=machine_learning" in line
        assert line.endswith("compareRunsMode=CHART") == (title == "charts")
    assert f"{runs}/{sweep.parent_run_id}?" in tracker.comparison_lines(sweep.parent_run_id)
    assert f"{runs}?workflowType=machine_learning" in tracker.comparison_lines(None)
    monkeypatch.setenv("LADEZEIT_OUTPUTS", str(outputs))
    assert "ladezeit-results ui\n" in tracker.comparison_lines(sweep), "the default store needs no address"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("see postgresql+psycopg://me:p/w@db/runs, then", "see postgresql+psycopg://***@db/runs, then"),
        ("https://token@host", "https://***@host"),
        ("mysql://u:p%40w@db?ssl=1&password=pw", "mysql://***@db?ssl=1&password=***"),
        ("postgresql://db/runs?user=me&sslmode=off&key=k", "postgresql://db/runs?user=***&sslmode=off&key=***"),
        ("http://h/x?API-KEY=k;access_key_id=i&apikey=1", "http://h/x?API-KEY=***;access_key_id=***&apikey=***"),
        ("connection failed: host=db password=pw port=1", "connection failed: host=db password=*** port=1"),
        ("http://h/#/e?viewStateShareKey=a&monkey=b&page=2", "http://h/#/e?viewStateShareKey=a&monkey=b&page=2"),
        ("sqlite:////a@b/mlflow.db", "sqlite:////a@b/mlflow.db"),
        ("mail me@example.org about file:///a/b", "mail me@example.org about file:///a/b"),
        ("http://host/a and ann@b.org", "http://host/a and ann@b.org"),
    ],
)
def test_addresses_lose_their_credentials_and_nothing_else(text: str, safe: str) -> None:
    """Every text on its way out goes through this: it must blank secrets and leave the rest readable."""
    assert redact_text(text) == safe


def test_the_command_line_starts_without_mlflow_and_matplotlib() -> None:
    """`ladezeit --help` answers at once: the heavy libraries are imported when they are needed."""
    code = (
        "import sys, ladezeit.analysis.attribution, ladezeit.report.sweep_table, ladezeit.report.timeline, "
        "ladezeit.tracking;"
        "print([name for name in ('mlflow', 'matplotlib', 'torch', 'transformers', 'scipy', 'pandas')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sample_folder_that_moved_is_still_imported(tracker: Any, tmp_path: Path) -> None:
    """Results are often copied from the machine that measured them; where they lie does not matter."""
    folder = tmp_path / "there"
    folder.mkdir()
    record(samples_planned=1).save_record(folder)
    write_sample(folder / "0", result())
    shutil.move(folder, tmp_path / "here")
    assert sync_folder(tmp_path / "here", tracker).written == 1
