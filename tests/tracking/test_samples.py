"""What a person finds in MLflow about one sample."""

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from example_results import not_ok, record, result, write_sample
from ladezeit.report.timeline import draw_timeline
from ladezeit.results.records import Result, Status, SweepRecord

SECRET = "postgresql://me:geh3im@db.example:5432/runs"


def logged(tracker: Any, measured: Result, folder: Path, sweep: SweepRecord | None = None) -> Any:
    """Write the sample's files, log it, and return the run as the store gives it back."""
    write_sample(folder, measured)
    run_id = tracker.log_sample(measured, folder, sweep, sweep.varying if sweep else ["loading", "cache"])
    return tracker.store.client.get_run(run_id)


def milliseconds(moment: str) -> int:
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


def test_a_sample_is_a_nested_run_with_its_own_times(tracker: Any, tmp_path: Path) -> None:
    """The run lists show when a sample was measured and how long it took, not when it was logged."""
    sweep = tracker.begin_sweep(record(), tmp_path)
    measured = result("legacy_manager", "cold", 3, job=7, label="cold·l_manager·#3")
    run = logged(tracker, measured, tmp_path / "7", sweep)
    assert run.info.run_name == "cold·l_manager·#3"
    assert run.info.status == "FINISHED"
    assert run.info.start_time == milliseconds(measured.started_at)
    assert run.info.end_time - run.info.start_time == round(1000 * measured.metrics["sample/wall_s"])
    assert run.data.tags["mlflow.parentRunId"] == sweep.parent_run_id
    assert run.data.tags["ladezeit.sweep"] == sweep.id
    assert run.data.tags["mlflow.source.git.commit"] == sweep.git_commit
    assert (tmp_path / "7" / ".mlflow_run_id").read_text() == run.info.run_id + "\n"


def test_what_varies_is_a_param_and_what_is_constant_a_tag(tracker: Any, tmp_path: Path) -> None:
    """Parallel coordinates draw every param: constants among them would bury what was varied."""
    run = logged(tracker, result("device_map_auto", "cold", 2), tmp_path, None)
    assert run.data.params == {"loading": "device_map_auto", "cache": "cold", "sample": "2"}
    tags = run.data.tags
    assert tags["config.model.name"] == "qwen2.5-7b-shape"
    assert tags["config.loading.dtype"] == "float16"
    assert json.loads(tags["config.model.architecture"])["hidden_size"] == 3584
    assert tags["environment.gpu.name"] == "NVIDIA H100 80GB HBM3"
    assert tags["environment.versions.torch"] == "2.11.0+cu130"
    assert tags["proof.passed"] == "true"
    assert tags["ladezeit.status"] == "ok"
    assert tags["ladezeit.point"] == "device_map_auto-cold"


def test_metrics_are_rounded_to_what_was_measured(tracker: Any, tmp_path: Path) -> None:
    """Fifteen digits hide the figure; bytes stay exact; what is not a number never reaches a chart."""
    measured = result(sweep=None)
    measured.metrics |= {"load/odd_s": math.inf, "load/none_s": math.nan}
    run = logged(tracker, measured, tmp_path)
    assert run.data.metrics["memory/gpu_allocated_peak_gib"] == 14.1881
    assert run.data.metrics["load/checkpoint_bytes"] == 15_231_233_024
    assert not {"load/odd_s", "load/none_s"} & set(run.data.metrics)
    assert all(math.isfinite(value) for value in run.data.metrics.values())


@pytest.mark.parametrize("status", list(Status))
def test_a_run_says_whether_there_is_a_measurement(tracker: Any, tmp_path: Path, status: Status) -> None:
    """A failed sample never looks finished in MLflow, and its description says why."""
    measured = result() if status is Status.ok else not_ok(status, "11.0 GiB free, 14.2 GiB wanted")
    run = logged(tracker, measured, tmp_path)
    expected = {Status.ok: "FINISHED", Status.killed: "KILLED", Status.skipped: "KILLED"}.get(status, "FAILED")
    assert run.info.status == expected
    assert run.data.tags["ladezeit.status"] == status.value
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith(f"**{status.value}**")
    if status is not Status.ok:
        assert run.data.tags["ladezeit.reason"] == "11.0 GiB free, 14.2 GiB wanted"
        assert "11.0 GiB free" in note


def test_the_description_repeats_the_run_and_shows_its_phases(tracker: Any, tmp_path: Path) -> None:
    """Who opens a run sees how it ended, the command to measure it again, and where the time went."""
    measured = result("legacy_manager")
    draw_timeline(measured, tmp_path / "timeline.png")
    run = logged(tracker, measured, tmp_path)
    note = run.data.tags["mlflow.note.content"]
    assert f"`{measured.identity.command}`" in note
    assert "load/module_walk" in note
    assert f"get-artifact?path=timeline.png&run_uuid={run.info.run_id}" in note


def test_the_files_of_a_sample_go_with_its_run(tracker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Result, configuration, log, text, trace and timeline open in MLflow's artifact view; phases are a table."""
    measured = not_ok(Status.failed, "no such file", sweep=None)
    (tmp_path / "generated.txt").write_text(" Paris.\n")
    draw_timeline(measured, tmp_path / "timeline.png")
    run = logged(tracker, measured, tmp_path)
    client = tracker.store.client
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    wanted = {"result.json", "config.yaml", "overrides.yaml", "worker.log", "generated.txt", "timeline.png"}
    assert names == wanted | {"traceback.txt", "phases.json"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.store.uri)  # load_table asks the process-wide store
    table = client.load_table(tracker.store.experiment_id, "phases.json", run_ids=[run.info.run_id])
    assert list(table["path"]) == ["process_start", "cuda_context", "cache_check", "load/config"]
    assert table["duration_s"].sum() == pytest.approx(sum(phase.duration_s for phase in measured.phases))


def test_the_same_sample_is_never_two_runs(tracker: Any, tmp_path: Path) -> None:
    """Importing again, or retrying after a failure whose answer was lost, does not double a measurement."""
    measured = result(sweep=None)
    first = logged(tracker, measured, tmp_path)
    (tmp_path / ".mlflow_run_id").unlink()
    second = logged(tracker, measured, tmp_path)
    assert first.info.run_id == second.info.run_id
    assert len(tracker.store.client.search_runs([tracker.store.experiment_id])) == 1
    other = result(sweep=None)
    other.started_at = "2026-03-02T00:00:00+00:00"
    assert logged(tracker, other, tmp_path).info.run_id != first.info.run_id


def test_a_run_that_was_cut_off_is_completed(tracker: Any, tmp_path: Path) -> None:
    """A process that died between creating a run and filling it leaves no empty run behind for good."""
    measured = result(sweep=None)
    opened = tracker._create(measured, None, tmp_path)
    assert opened.info.status == "RUNNING"
    run = logged(tracker, measured, tmp_path)
    assert run.info.run_id == opened.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["load/total_s"] > 0


def test_odd_and_long_values_are_logged_visibly_shortened(tracker: Any, tmp_path: Path) -> None:
    """MLflow cuts long values silently and refuses `[0]` in a key: nothing of that may lose a run."""
    measured = result(sweep=None, label="a label that is longer than lists show")
    measured.config["loading"]["name"] = "x" * 7000
    measured.config["inference"]["prompt"] = "y" * 7000
    measured.environment |= {"disks[0]": {"ü": 1}, "many": {f"fact{i}": i for i in range(250)}}
    measured.metrics["load/shard[0]_s"] = 1.5
    run = logged(tracker, measured, tmp_path)
    assert run.info.run_name == "a label that is long"
    assert run.data.params["loading"].endswith("… (cut, 7000 characters)")
    assert len(run.data.params["loading"]) <= 6000
    assert run.data.tags["config.inference.prompt"].endswith("… (cut, 7000 characters)")
    assert run.data.tags["environment.disks_0_._"] == "1"
    assert run.data.tags["environment.many.fact249"] == "249"
    assert run.data.metrics["load/shard_0__s"] == 1.5


def test_credentials_reach_neither_the_store_nor_its_files(tracker: Any, tmp_path: Path) -> None:
    """A password in an address may be typed anywhere; it must not be readable by everybody who sees the runs."""
    measured = not_ok(Status.failed, f"cannot connect to {SECRET}", sweep=None)
    measured.config["tracking"]["uri"] = SECRET
    measured.config["model"]["path"] = SECRET
    measured.config["loading"]["name"] = SECRET
    measured.environment["store"] = {"uri": SECRET + "?password=geh3im"}
    write_sample(tmp_path, measured)
    (tmp_path / "worker.log").write_text(f"connecting to {SECRET}\n")
    (tmp_path / ".hydra" / "config.yaml").write_text(f"tracking:\n  uri: {SECRET}\n")
    run_id = tracker.log_sample(measured, tmp_path, None, ["loading"])
    store = tracker.store
    assert b"geh3im" not in store.database.read_bytes()
    folder = store.database.parent / "artifacts" / run_id
    assert not [path for path in folder.rglob("*") if path.is_file() and b"geh3im" in path.read_bytes()]
    assert store.client.get_run(run_id).data.params["loading"] == "postgresql://***@db.example:5432/runs"


def test_a_huge_log_is_cut_to_its_end(tracker: Any, tmp_path: Path) -> None:
    """A worker that wrote gigabytes must not fill the store's disk; the end of a log tells why it ended."""
    measured = result(sweep=None)
    write_sample(tmp_path, measured)
    (tmp_path / "worker.log").write_text("x" * 3_000_000 + "the last words\n")
    run_id = tracker.log_sample(measured, tmp_path, None, [])
    text = (tracker.store.database.parent / "artifacts" / run_id / "artifacts" / "worker.log").read_text()
    assert text.startswith("… (the last 1000000 of 3000015 bytes)")
    assert text.endswith("the last words\n")
