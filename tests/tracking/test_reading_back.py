"""A sweep that was logged to a server can be decided from anywhere: the results come back from its artifacts."""

from pathlib import Path

import planted
from ladezeit.analysis.comparison import compare_points
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.results.records import SweepRecord, read_result
from ladezeit.tracking import SweepStatus, open_tracker
from ladezeit.tracking.reader import read_experiment


def test_a_server_gives_back_what_was_logged(server: str, tmp_path: Path) -> None:
    """The comparison made from the server is the one made from the files, to the last digit."""
    folder = planted.write(tmp_path / "sweep", planted.sweep(samples=5))
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.server, uri=server, experiment="read back"), tmp_path)
    record = tracker.begin_sweep(SweepRecord.read_record(folder), folder)
    for job in range(35):
        tracker.log_sample(read_result(folder / str(job)), folder / str(job), record, record.varying)
    tracker.end_sweep(record, SweepStatus.FINISHED, "")
    found = read_experiment("read back", server)
    assert not found.unreadable and not found.left_out and len(found.results) == 35
    with_proof = [result for result in found.results if result.proof]
    assert with_proof and all(result.phases for result in with_proof)
    own = compare_points(found.results, found.varying).sections[0]
    files = compare_points(planted.sweep(), ["loading", "validation"]).sections[0]
    assert [(p.rank, p.spread, p.p) for p in own.ranked] == [(p.rank, p.spread, p.p) for p in files.ranked]


def test_a_run_that_is_still_open_is_named(server: str, tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", planted.sweep(samples=1))
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.server, uri=server, experiment="open runs"), tmp_path)
    record = tracker.begin_sweep(SweepRecord.read_record(folder), folder)
    tracker.log_sample(read_result(folder / "0"), folder / "0", record, record.varying)
    client = tracker.store.client  # type: ignore[attr-defined]
    client.create_run(tracker.store.experiment_id, tags={"ladezeit.role": "sample"})  # type: ignore[attr-defined]
    found = read_experiment("open runs", server)
    assert len(found.results) == 1
    assert len(found.left_out) == 1 and "still running, or its process died" in found.left_out[0]
