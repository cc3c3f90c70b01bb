"""What docs/regression-gate.md promises is so: its workflow is one, and its commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

import planted
from ladezeit.analysis.regression import Outcome
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.tracking import open_tracker
from ladezeit.tracking.sync import sync_folder

PAGE = (Path(__file__).parents[2] / "docs" / "regression-gate.md").read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
STEPS: list[dict[str, Any]] = WORKFLOW["jobs"]["loading-time"]["steps"]


def run(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    free = {key: value for key, value in os.environ.items() if key not in ("LADEZEIT_OUTPUTS", "MLFLOW_TRACKING_URI")}
    words = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
    return subprocess.run(words, cwd=place, env=free, capture_output=True, text=True, check=False)


def test_the_workflow_is_a_workflow() -> None:
    """Names and shape as GitHub wants them: a trigger, one job, each step either uses or runs something."""
    assert WORKFLOW[True]["pull_request"]["paths"]  # YAML reads `on` as true
    assert list(WORKFLOW["jobs"]) == ["loading-time"]
    assert {"runs-on", "timeout-minutes", "env", "steps"} == set(WORKFLOW["jobs"]["loading-time"])
    assert all(("uses" in step) != ("run" in step) for step in STEPS)


def test_all_outcomes_of_the_table_are_those_that_there_are() -> None:
    table = PAGE.partition("| outcome |")[2].partition("\n\n")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == {outcome.value for outcome in Outcome}


@pytest.mark.slow
def test_the_commands_of_the_workflow_run(tmp_path: Path, with_store: Callable[[Path], Path]) -> None:
    """All of it but the installing: two real sweeps, the check, and the files that are kept, whatever was found."""
    points = WORKFLOW["jobs"]["loading-time"]["env"]["POINTS"]
    commands = [step["run"].replace("$POINTS", points) for step in STEPS if "run" in step]
    commands = [shlex.split(command) for command in commands if command.startswith("ladezeit")]
    assert [command[0] for command in commands] == ["ladezeit", "ladezeit", "ladezeit-results"]
    with_store(tmp_path / "outputs")
    for command in commands[:2]:
        done = run([*command, "discard_first=false", "ceilings=false"], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run(commands[2], tmp_path)
    document = json.loads((tmp_path / "check.json").read_text())
    assert done.returncode == (0 if document["passed"] else 1), done.stderr
    assert len(document["points"]) == 2 and not {"broken", "missing"} & {p["outcome"] for p in document["points"]}
    assert len(list(ET.parse(tmp_path / "check.xml").iter("testcase"))) == 2


def test_the_commands_at_the_top_of_the_page_run(tmp_path: Path, with_store: Callable[[Path], Path]) -> None:
    """The baseline as a folder and as an experiment."""
    truth = {"transformers": 1.0, "streamed": 1.0}
    for day, name in enumerate(("baseline", "new"), start=1):
        results = planted.sweep(6, truth, bad=False)
        for result in results:
            result.started_at = result.started_at.replace("2026-03-01", f"2026-04-0{day}")
        planted.write(tmp_path / "outputs" / "sweeps" / name, results)
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite), with_store(tmp_path / "outputs"))
    sync_folder(tmp_path / "outputs" / "sweeps" / "baseline", tracker)
    commands = re.findall(r"^\$ (ladezeit-results check .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = run(shlex.split(command), tmp_path)
        assert done.returncode == 0, done.stderr
        assert "within the limit" in done.stdout
