"""Files into MLflow: as often as one likes, from any machine, and always to the same runs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from example_results import record, result, sweep_results, write_sample
from ladezeit.errors import LadezeitError, TrackingError
from ladezeit.results.records import Status, SweepRecord
from ladezeit.tracking.owner import Owner
from ladezeit.tracking.reader import read_experiment
from ladezeit.tracking.sync import list_folders, sync_folder


def copied_sweep(folder: Path, samples: int = 1) -> Path:
    """Write a sweep as it arrives from another machine: with that machine's ids of runs in it, and its markers."""
    folder.mkdir(parents=True)
    replace(record(samples_planned=10 * samples), experiment_id="77", parent_run_id="f" * 32).save_record(folder)
    for measured in sweep_results(samples):
        own = write_sample(folder / str(measured.identity.job), measured)
        (own / ".mlflow_run_id").write_text("e" * 32 + "\n")
    (folder / "summary.md").write_text("| what the sweep said | itself |\n| :-- | :-- |\n")
    return folder


def everything(tracker: Any) -> dict[str, Any]:
    """Return all that a person could see of the experiment's runs, by run id."""
    client, experiment = tracker.store.client, tracker.store.experiment_id
    return {
        run.info.run_id: (run.info.status, run.info.end_time, run.data.metrics, run.data.params, run.data.tags)
        for run in client.search_runs([experiment], max_results=100)
    }


def test_a_copied_sweep_comes_in_whole_and_only_once(tracker: Any, tmp_path: Path) -> None:
    """Parent, children, times, view: all in one experiment, though the files' own ids are another store's."""
    folder = copied_sweep(tmp_path / "sweeps" / "copied")
    first = sync_folder(folder, tracker)
    assert (first.written, first.known, first.left_alone) == (10, 0, None)
    before = everything(tracker)
    assert len(before) == 11
    parent = SweepRecord.read_record(folder).parent_run_id
    assert parent in before and before[parent][0] == "FINISHED"
    assert "what the sweep said" in before[parent][4]["mlflow.note.content"]
    nested = [tags for *_, tags in before.values() if tags["ladezeit.role"] == "sample"]
    assert {tags["mlflow.parentRunId"] for tags in nested} == {parent}
    assert f"viewStateShareKey=ladezeit-{record().id}" in tracker.comparison_lines(first.sweep)
    again = sync_folder(folder, tracker)
    assert (again.written, again.known) == (0, 10)
    assert everything(tracker) == before, "twice is as once"
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert sync_folder(tmp_path / "elsewhere", tracker).written == 0
    assert everything(tracker) == before


def test_what_was_added_comes_in_too(tracker: Any, tmp_path: Path) -> None:
    """A sweep that was cut off and went on ends as complete."""
    folder = copied_sweep(tmp_path / "sweep")
    late = folder / "9"
    shutil.move(late, tmp_path / "late")
    assert sync_folder(folder, tracker).written == 9
    parent = SweepRecord.read_record(folder).parent_run_id
    assert everything(tracker)[parent or ""][0] == "KILLED"
    shutil.move(tmp_path / "late", late)
    done = sync_folder(folder, tracker)
    assert (done.written, done.known) == (1, 9)
    assert everything(tracker)[parent or ""][0] == "FINISHED" and len(everything(tracker)) == 11


def test_folders_of_folders_are_taken_apart(tracker: Any, tmp_path: Path) -> None:
    """One command brings in all outputs: sweeps, and single runs beside them, but no warm-up of a sweep."""
    copied_sweep(tmp_path / "sweeps" / "one")
    write_sample(tmp_path / "sweeps" / "one" / "warm-up", result(sweep=None, job=-1))
    alone = write_sample(tmp_path / "runs" / "alone", result("device_map_auto", sweep=None))
    assert list(list_folders(tmp_path)) == [alone, tmp_path / "sweeps" / "one"]
    assert [sync_folder(alone, tracker).written for _ in range(2)] == [1, 0]
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(LadezeitError):
            list(list_folders(wrong))


@pytest.fixture
def living() -> Iterator[Owner]:
    """Another process that lives, as an owner."""
    code = "from ladezeit.tracking.owner import Owner; print(Owner.this_process().tags, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    tags = json.loads(process.stdout.readline().replace("'", '"'))
    yield Owner.of_tags(tags)  # type: ignore[misc]
    process.communicate("\n")


def test_a_sweep_that_runs_is_left_alone(tracker: Any, tmp_path: Path, living: Owner) -> None:
    """Syncing everything while a sweep runs must not close it under its feet."""
    folder = copied_sweep(tmp_path / "sweep")
    shutil.rmtree(folder / "9")
    opened = tracker.begin_sweep(SweepRecord.read_record(folder), folder)
    for key, value in living.tags.items():
        tracker.store.client.set_tag(opened.parent_run_id, key, value)
    done = sync_folder(folder, tracker)
    assert done.written == 0 and done.left_alone == f"process {living.pid} on {living.host} is at it"
    assert list(everything(tracker)) == [opened.parent_run_id]


def create_again(tracker: Any, run: Any) -> str:
    """Create a run with the very tags and times of another one, as a request does that is sent twice."""
    again = tracker.store.client.create_run(
        tracker.store.experiment_id,
        start_time=run.info.start_time,
        run_name=run.info.run_name,
        tags={**run.data.tags, "ladezeit.created": "9999"},
    )
    return str(again.info.run_id)


def test_of_duplicates_the_oldest_is_kept(tracker: Any, tmp_path: Path) -> None:
    """A measurement or a sweep that is there twice counts twice in every average and chart."""
    folder = copied_sweep(tmp_path / "sweep")
    sync_folder(folder, tracker)
    before = everything(tracker)
    client = tracker.store.client
    runs = [client.get_run(run_id) for run_id in before]
    (parent,) = [run for run in runs if run.data.tags["ladezeit.role"] == "sweep"]
    sample = next(run for run in runs if run.data.tags["ladezeit.role"] == "sample")
    second_parent, second = create_again(tracker, parent), create_again(tracker, sample)
    client.set_tag(sample.info.run_id, "mlflow.parentRunId", second_parent)
    assert sync_folder(folder, tracker).written == 0
    after = everything(tracker)
    assert {run_id: after[run_id] for run_id in before} == before, "the samples are below the oldest again"
    for run_id, oldest in ((second_parent, parent.info.run_id), (second, sample.info.run_id)):
        status, _, _, _, tags = after[run_id]
        assert status == "KILLED" and tags["ladezeit.role"] == "duplicate"
        assert tags["ladezeit.reason"] == f"duplicate of run {oldest}"
    found = read_experiment(client.get_experiment(tracker.store.experiment_id).name, tracker.store.uri)
    assert len(found.results) == 10
    assert sync_folder(folder, tracker).written == 0 and everything(tracker) == after


def test_what_a_person_deleted_stays_deleted(tracker: Any, tmp_path: Path) -> None:
    """Who removes a sample, a run or a sweep from the interface does not want it back with the next sync."""
    folder = copied_sweep(tmp_path / "sweep")
    alone = write_sample(tmp_path / "alone", result(sweep=None))
    sync_folder(folder, tracker)
    sync_folder(alone, tracker)
    client = tracker.store.client
    sample, single = ((at / ".mlflow_run_id").read_text().strip() for at in (folder / "3", alone))
    for run_id in (sample, single):
        client.delete_run(run_id)
    before = set(everything(tracker))
    for at in (folder / "3", alone):
        (at / ".mlflow_run_id").unlink()  # as if the files came from another machine
    assert (sync_folder(folder, tracker).written, sync_folder(alone, tracker).written) == (0, 0)
    assert set(everything(tracker)) == before and not {sample, single} & before
    parent = SweepRecord.read_record(folder).parent_run_id
    client.delete_run(parent)
    assert sync_folder(folder, tracker).left_alone == "its run was deleted in MLflow"
    assert set(everything(tracker)) == before - {parent}
    with pytest.raises(TrackingError, match="deleted in MLflow"):
        tracker.begin_sweep(record(), folder)


def test_a_half_written_sample_is_filled(tracker: Any, tmp_path: Path) -> None:
    """A process that died while it wrote leaves a run without figures; its file has them all."""
    folder = copied_sweep(tmp_path / "sweep")
    opened = tracker.begin_sweep(SweepRecord.read_record(folder), folder)
    half = next(measured for measured in sweep_results(1) if measured.status is Status.ok)
    run = tracker._create(half, opened, folder / "0")
    tracker.store.client.log_metric(run.info.run_id, "load/total_s", half.metrics["load/total_s"])
    assert sync_folder(folder, tracker).written == 10
    status, _, metrics, params, _ = everything(tracker)[run.info.run_id]
    assert status == "FINISHED" and "inference/first_token_s" in metrics and params["loading"]


@pytest.mark.slow
def test_the_commands_say_what_they_did(tmp_path: Path) -> None:
    """`sync` fills a store that was not there, and again changes nothing; `reap` finds nothing left open in it."""
    copied_sweep(tmp_path / "outputs" / "sweeps" / "copied")
    free = {key: value for key, value in os.environ.items() if key not in ("LADEZEIT_OUTPUTS", "MLFLOW_TRACKING_URI")}
    script = str(Path(sys.executable).with_name("ladezeit-results"))

    def said(*words: str) -> str:
        done = subprocess.run([script, *words], cwd=tmp_path, env=free, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    first = said("sync")
    assert "copied: 10 written, 0 known" in first and "averages  http://127.0.0.1:5000/" in first
    assert "copied: 0 written, 10 known" in said("sync", "outputs")
    assert said("reap", "--dry-run") == "no run is open\n"
