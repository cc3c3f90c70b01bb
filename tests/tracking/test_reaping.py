"""Runs that dead processes left open: each gets the end that it really had, and no living one is touched."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from example_results import result, write_sample
from ladezeit.tracking.owner import Life, Owner
from ladezeit.tracking.sync import Fate, Finding, close_orphans, find_orphans

#: Opens a sweep and one run of a sample that it never fills, logs another sample, and waits to be killed.
SWEEPING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from example_results import record, result, write_sample
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.tracking import open_tracker
outputs, experiment, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment=experiment), outputs)
folder = outputs / "sweeps" / name
folder.mkdir(parents=True)
planned = int(sys.argv[5])
sweep = tracker.begin_sweep(record(name, samples_planned=planned), folder)
done, cut_off, lost = (result(sample=n, job=n, sweep=name) for n in range(3))
tracker.log_sample(done, write_sample(folder / "0", done), sweep, sweep.varying)
tracker._create(cut_off, sweep, write_sample(folder / "1", cut_off))
if planned > 2:
    tracker._create(lost, sweep, folder / "2")
print("ready", flush=True)
time.sleep(600)
"""


@dataclass
class Sweeps:
    """An experiment in which three processes opened sweeps: two were killed, one lives."""

    tracker: Any
    folder: Path
    living: subprocess.Popen[str]

    def named(self, findings: list[Finding], sweep: str) -> list[Finding]:
        """Return the findings about one sweep's runs."""
        client = self.tracker.store.client
        return [f for f in findings if client.get_run(f.run_id).data.tags["ladezeit.sweep"] == sweep]

    def ends(self) -> dict[tuple[str, str], str]:
        """Return the status of every run by sweep and name."""
        runs = self.tracker.store.client.search_runs([self.tracker.store.experiment_id], max_results=100)
        return {(run.data.tags["ladezeit.sweep"], run.info.run_name): run.info.status for run in runs}


@pytest.fixture
def sweeps(tmp_path: Path, with_store: Callable[[Path], Path]) -> Iterator[Sweeps]:
    from ladezeit.config import TrackingConfig, TrackingKind
    from ladezeit.tracking import open_tracker

    outputs = with_store(tmp_path)
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment="reap"), outputs)
    examples = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SWEEPING, str(outputs), "reap", name, examples, planned],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, planned in (("cut-off", "3"), ("complete", "2"), ("living", "3"))
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes[:2]:
        process.send_signal(signal.SIGKILL)
        process.wait()
    yield Sweeps(tracker, outputs / "sweeps", processes[2])
    processes[2].kill()
    processes[2].wait()


def test_dead_sweeps_get_their_true_end_and_living_ones_stay_open(sweeps: Sweeps) -> None:
    """What was measured is there; what was lost is KILLED with the reason; complete is FINISHED; living is running.

    A dry run says all of it before, and changes nothing.
    """
    before = sweeps.ends()
    found = find_orphans(sweeps.tracker, sweeps.folder)
    assert sweeps.ends() == before
    assert {f.fate for f in sweeps.named(found, "living")} == {Fate.left_alone}
    assert all(str(sweeps.living.pid) in f.why and "lives" in f.why for f in sweeps.named(found, "living"))
    assert [f.fate for f in sweeps.named(found, "cut-off")] == [Fate.from_files, Fate.from_files, Fate.killed]
    assert [f.fate for f in sweeps.named(found, "complete")] == [Fate.from_files, Fate.from_files]
    close_orphans(sweeps.tracker, sweeps.folder)
    ends = sweeps.ends()
    assert ends["cut-off", "origin_case"] == "KILLED" and ends["complete", "origin_case"] == "FINISHED"
    assert ends["living", "origin_case"] == "RUNNING"
    samples = {key: status for key, status in ends.items() if key[1] != "origin_case"}
    assert sorted(s for (sweep, _), s in samples.items() if sweep == "cut-off") == ["FINISHED", "FINISHED", "KILLED"]
    assert sorted(s for (sweep, _), s in samples.items() if sweep == "complete") == ["FINISHED", "FINISHED"]
    assert sorted(s for (sweep, _), s in samples.items() if sweep == "living") == ["FINISHED", "RUNNING", "RUNNING"]
    client, experiment = sweeps.tracker.store.client, sweeps.tracker.store.experiment_id
    (parent,) = client.search_runs([experiment], "tags.`ladezeit.sweep` = 'cut-off' and tags.`ladezeit.role` = 'sweep'")
    assert "2 of 3 samples" in parent.data.tags["ladezeit.reason"]
    (lost,) = client.search_runs([experiment], "tags.`ladezeit.role` = 'sample' and attributes.status = 'KILLED'")
    assert "died, and no result is left" in lost.data.tags["mlflow.note.content"]
    again = close_orphans(sweeps.tracker, sweeps.folder)
    assert {f.fate for f in again} == {Fate.left_alone}, "a second time finds the living one alone"


def test_a_run_of_another_machine_is_never_touched(tracker: Any, tmp_path: Path) -> None:
    """A pid says nothing about another machine's processes, nor about those of another container."""
    here = Owner.this_process()
    dead = replace(here, pid="4194304", started="1")
    others = [
        replace(dead, host="bench-2"),
        replace(dead, machine="0" * 32),
        replace(dead, namespace="pid:[1]"),
        replace(dead, boot="another", machine=""),
    ]
    for number, owner in enumerate(others):
        opened = tracker._create(result(job=number, sweep=None), None, tmp_path)
        for key in here.tags:
            tracker.store.client.set_tag(opened.info.run_id, key, owner.tags.get(key, ""))
    if here.machine:
        assert replace(dead, boot="before the restart").check_life() is Life.dead
    found = close_orphans(tracker, tmp_path)
    assert len(found) == 4 and {finding.fate for finding in found} <= {Fate.left_alone}
    assert all("another machine or container" in finding.why for finding in found)


def test_a_reused_pid_is_not_the_same_process() -> None:
    """Pids come round again: the process that has it now did not open the run."""
    here = Owner.this_process()
    assert here.check_life() is Life.lives and here.pid == str(os.getpid())
    assert replace(here, started="1").check_life() is Life.dead
    assert Owner.of_tags(here.tags) == here and Owner.of_tags({}) is None


def test_a_run_that_does_not_say_who_opened_it_is_left_alone(tracker: Any, tmp_path: Path) -> None:
    client = tracker.store.client
    client.create_run(tracker.store.experiment_id, tags={"ladezeit.role": "sample"})
    (found,) = close_orphans(tracker, tmp_path)
    assert found.fate is Fate.left_alone and "does not say" in found.why


def test_a_single_run_is_closed_from_its_file(tracker: Any, tmp_path: Path) -> None:
    """A run outside any sweep whose process died between creating and filling it."""
    measured = result(sweep=None)
    folder = write_sample(tmp_path / "run", measured)
    opened = tracker._create(measured, None, folder)
    tracker.store.client.set_tag(opened.info.run_id, "ladezeit.process.started", "1")
    (found,) = close_orphans(tracker, tmp_path)
    assert found.fate is Fate.from_files
    closed = tracker.store.client.get_run(opened.info.run_id)
    assert closed.info.status == "FINISHED" and closed.data.metrics["load/total_s"] > 0
