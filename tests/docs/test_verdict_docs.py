"""What docs/reading-a-verdict.md promises is so: its commands run, its figures are those that were computed."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import planted
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.results.records import SweepRecord, read_result
from ladezeit.tracking import SweepStatus, open_tracker

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reading-a-verdict.md"
COMMANDS = re.findall(r"^\$ (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> Path:
    """A folder with the sweep and the experiment that the page speaks of."""
    folder = tmp_path_factory.mktemp("docs")
    truth = {"transformers": 1.0, "legacy_manager": 1.0}
    sweep = planted.write(folder / "outputs" / "sweeps" / "demo", planted.sweep(truth=truth, bad=False))
    tracker = open_tracker(
        TrackingConfig(kind=TrackingKind.sqlite, experiment="ladezeit"), with_store(folder / "outputs")
    )
    record = tracker.begin_sweep(SweepRecord.read_record(sweep), sweep)
    for job in range(10):
        tracker.log_sample(read_result(sweep / str(job)), sweep / str(job), record, record.varying)
    tracker.end_sweep(record, SweepStatus.FINISHED, "")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_runs(place: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    script = Path(sys.executable).with_name(program)
    free = {key: value for key, value in os.environ.items() if key not in ("LADEZEIT_OUTPUTS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run([str(script), *arguments], cwd=place, env=free, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_calibration_on_the_page_is_the_one_that_was_measured() -> None:
    """Every row of the page's two tables stands in the benchmark's own result."""
    measured = (ROOT / "benchmarks" / "results" / "calibration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:light|heavy-tailed|drift|jumps) .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 20 and all(row in measured for row in rows)


def test_no_row_of_the_calibration_breaks_the_promise() -> None:
    measured = (ROOT / "benchmarks" / "results" / "calibration.md").read_text(encoding="utf-8")
    rates = re.findall(r"^\| [\w-]+ \| \d+ \| \d+ \| ([\d.]+) % \|", measured, re.MULTILINE)
    assert len(rates) == 32 and max(map(float, rates)) <= 5.0
