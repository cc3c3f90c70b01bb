"""`ladezeit-results check` as a CI job meets it: exit codes, words, JSON and JUnit XML that readers accept."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import planted
from ladezeit.config import TrackingConfig, TrackingKind
from ladezeit.results.records import Status
from ladezeit.tracking import open_tracker
from ladezeit.tracking.sync import sync_folder

Run = Callable[..., subprocess.CompletedProcess[str]]

TRUTH = {"cuda_fp16": 1.0, "transformers": 1.0, "streamed": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> Path:
    """A folder with a baseline, a sweep that equals it, a slow one, a broken one, and the baseline in MLflow."""
    folder = tmp_path_factory.mktemp("gate")
    sweeps = {
        "baseline": planted.sweep(6, TRUTH, bad=False),
        "same": planted.sweep(6, dict.fromkeys(TRUTH, 1.001), bad=False),
        "slow": planted.sweep(6, {**TRUTH, "streamed": 1.6}, bad=False),
        "broken": planted.sweep(6, TRUTH, bad=False),
        "elsewhere": planted.sweep(6, dict.fromkeys(TRUTH, 1.001), bad=False),
        "few": planted.sweep(3, TRUTH, bad=False),
    }
    for result in sweeps["broken"][:1]:
        result.status, result.reason = Status.failed, "\x1b[31mno \x00kernel & <image>\x1b[0m"
    for result in sweeps["elsewhere"]:
        result.environment = {**planted.MACHINE, "cpu": {"model": "Xeon", "available": 16}}
    for day, (name, results) in enumerate(sweeps.items(), start=1):
        for result in results:
            result.started_at = result.started_at.replace("2026-03-01", f"2026-04-{day:02}")
        planted.write(folder / name, results)
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment="main"), with_store(folder / "outputs"))
    sync_folder(folder / "baseline", tracker)
    return folder


@pytest.fixture
def run(place: Path) -> Run:
    """Run `ladezeit-results check` in that folder."""
    script = Path(sys.executable).with_name("ladezeit-results")

    def started(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [str(script), "check", *arguments]
        return subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)

    return started


def test_a_slowdown_fails_the_job_and_all_three_forms_agree(run: Run, place: Path) -> None:
    done = run("slow", "--baseline", "baseline", "--max-slowdown", "10%", "--json", "c.json", "--junit", "j.xml")
    assert done.returncode == 1, done.stderr
    assert "SLOWER      streamed" in done.stdout and "times as long" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("FAILED: 1 slower than allowed, 2 within the limit")
    document = json.loads((place / "c.json").read_text())
    (slow,) = [point for point in document["points"] if point["failing"]]
    assert document["passed"] is False and slow["name"] == "streamed" and slow["ratio_low"] > 1.1
    suite = ET.parse(place / "j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (
        "3",
        "1",
        "0",
        "0",
    )
    (failed,) = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed.get("name") == "streamed" and "1.6" in str(failed.find("failure").get("message"))  # type: ignore[union-attr]


def test_nothing_slower_passes(run: Run) -> None:
    done = run("same", "--baseline", "baseline", "--max-slowdown", "10 %")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("passed: 3 within the limit")


def test_odd_texts_stay_valid_xml_in_the_shape_that_readers_demand(run: Run, place: Path) -> None:
    """An error with colours and NUL bytes in it must not make the report unreadable; Ant's and Jenkins' rules hold."""
    done = run("broken", "--baseline", "baseline", "--max-slowdown", "10%", "--junit", "odd.xml")
    assert done.returncode == 1 and "BROKEN" in done.stdout
    root = ET.parse(place / "odd.xml").getroot()
    assert root.tag == "testsuites" and not root.keys() and [child.tag for child in root] == ["testsuite"]
    suite = root[0]
    wanted = {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"}
    assert set(suite.keys()) == wanted
    tags = [child.tag for child in suite]
    assert tags == ["properties", *["testcase"] * 3, "system-out", "system-err"]
    for case in suite.iter("testcase"):
        assert set(case.keys()) == {"name", "classname", "time"} and float(case.get("time", "")) >= 0
        assert len(case) <= 1
    message = next(suite.iter("failure")).get("message", "")
    assert r"\x1b[31mno \x00kernel & <image>" in message


def test_an_experiment_or_a_run_is_a_baseline_too(run: Run, place: Path) -> None:
    """What CI logged to MLflow on the main branch needs no files to be kept."""
    parent = json.loads((place / "baseline" / "sweep.json").read_text())["parent_run_id"]
    assert run("slow", "--baseline", "main", "--max-slowdown", "10%").returncode == 1
    assert run("same", "--baseline", parent, "--max-slowdown", "10%").returncode == 0
    held = run("baseline", "--baseline", "main", "--max-slowdown", "10%")
    assert held.returncode == 2 and "name an older sweep" in held.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("same", "--baseline", "nowhere/x", "--max-slowdown", "10%"), "does not exist"),
        (("same", "--baseline", "nobody", "--max-slowdown", "10%"), "it has Default, main"),
        (("same", "--baseline", "baseline", "--max-slowdown", "10"), "write a percentage"),
        (("same", "--baseline", "baseline", "--max-slowdown", "-1%"), "write a percentage"),
        (("same", "--baseline", "baseline"), "--max-slowdown"),
        (("few", "--baseline", "baseline", "--max-slowdown", "10%"), "sample=range(5)"),
        (("elsewhere", "--baseline", "baseline", "--max-slowdown", "10%"), "cpu: AMD EPYC 9454 / Xeon"),
        (("same", "--baseline", "baseline", "--max-slowdown", "1%", "--junit", "no/j.xml"), "cannot be written"),
    ],
)
def test_what_cannot_be_checked_exits_with_2(run: Run, arguments: tuple[str, ...], said: str) -> None:
    """Neither passed nor failed: the job is set up wrongly, and says how."""
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_machines_are_compared_only_when_asked(run: Run) -> None:
    assert run("elsewhere", "--baseline", "baseline", "--max-slowdown", "10%", "--across-machines").returncode == 0


def test_points_can_be_chosen_and_missing_ones_allowed(run: Run) -> None:
    """`--where` narrows both sides; without it, what is not there any more fails."""
    only = run("slow", "--baseline", "baseline", "--max-slowdown", "10%", "--where", "loading=transformers")
    assert only.returncode == 0 and "streamed" not in only.stdout
