"""A sweep through the installed script: order, skips, failures, interruption, statuses in MLflow, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ladezeit.results.fields import point_command
from ladezeit.results.records import Result

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]

BASE = ("-m", "model=tiny", "device=cpu", "process=prewarmed", "inference=none", "ceilings=off")


def results(folder: Path) -> list[dict]:
    """Return all compared results under `folder`, in the order they were measured in."""
    places = [path for part in ("sweeps", "runs") for path in (folder / "outputs" / part).rglob("result.json")]
    found = [json.loads(path.read_text()) for path in places]
    return sorted((r for r in found if r["identity"]["job"] >= 0), key=lambda r: r["identity"]["job"])


def runs(folder: Path) -> tuple[list, list]:
    """Return the parent runs and the sample runs that MLflow holds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name == "ladezeit"]
    found = client.search_runs(experiments, max_results=500)
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if run not in parents]


def test_points_are_measured_in_shuffled_blocks_of_samples(ladezeit: Run, tmp_path: Path) -> None:
    """Drift hits every method alike: each block holds each point once, in an order that the seed decides."""
    arguments = (*BASE, "loading=transformers,cuda_fp16", "cache=warm,as_is", "sample=range(3)", "tracking=none")
    shown = ladezeit(*arguments)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    measured = results(tmp_path)
    assert [r["identity"]["sample"] for r in measured] == [0] * 4 + [1] * 4 + [2] * 4
    blocks = [[r["identity"]["point"] for r in measured[start : start + 4]] for start in (0, 4, 8)]
    assert all(sorted(block) == sorted(blocks[0]) and len(set(block)) == 4 for block in blocks)
    assert blocks[0] != blocks[1] or blocks[1] != blocks[2]
    assert "load" in shown.stdout and "cuda_fp16" in shown.stdout and "3 ok" in shown.stdout


def test_a_bad_point_costs_itself_alone_and_everything_is_in_mlflow(ladezeit: Run, tmp_path: Path) -> None:
    """One point dies, one makes no sense, one is wrong: the rest is measured, each has its status, exit code 1."""
    conf = tmp_path / "conf" / "loading"
    conf.mkdir(parents=True)
    schema = "defaults: [/schema/loading/transformers@_here_, _self_]\n"
    (conf / "dies.yaml").write_text(f"{schema}name: dies\nengine: engines_for_tests:KilledFromOutside\n")
    (conf / "unties.yaml").write_text(f"{schema}name: unties\nengine: engines_for_tests:ForgetsTheHead\n")
    (conf / "senseless.yaml").write_text(f"{schema}name: senseless\nmax_memory: {{device: 1GiB}}\n")
    methods = "loading=transformers,dies,unties,senseless"
    shown = ladezeit("--config-dir", str(conf.parent), *BASE, methods, "sample=range(2)")
    assert shown.returncode == 1, shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr and "will be skipped" in shown.stdout
    statuses = {(r["config"]["loading"]["name"], r["status"]) for r in results(tmp_path)}
    assert statuses == {("transformers", "ok"), ("dies", "killed"), ("unties", "wrong"), ("senseless", "skipped")}
    (parent,), samples = runs(tmp_path)
    assert parent.info.status == "FINISHED" and len(samples) == 8
    logged = {(run.data.params["loading"], run.data.tags["ladezeit.status"], run.info.status) for run in samples}
    assert logged == {
        ("transformers", "ok", "FINISHED"),
        ("dies", "killed", "KILLED"),
        ("unties", "wrong", "FAILED"),
        ("senseless", "skipped", "KILLED"),
    }
    assert all(len(run.info.run_name) <= 20 for run in samples)
    assert len({run.info.run_name for run in samples}) == 8
    check_the_report(tmp_path, parent)


def check_the_report(folder: Path, parent: Any) -> None:
    """The report names what was not measured, in the sweep's folder and in MLflow, where the verdict comes first."""
    from mlflow.tracking import MlflowClient

    (page,) = (folder / "outputs" / "sweeps").glob("*/report/report.html")
    text = page.read_text(encoding="utf-8")
    assert "Undecided" in text and all(name in text for name in ("transformers", "dies", "unties", "senseless"))
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("- Undecided: fewer than 5 samples per configuration") and "| loading" in note.replace(
        "&emsp;", " "
    )
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    logged = {file.path for file in client.list_artifacts(parent.info.run_id, "report")}
    assert {"report/report.md", "report/report.html", "report/report-1-samples.png"} <= logged


def test_a_report_that_cannot_be_written_costs_the_sweep_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured is measured: a full disk or a folder in the way ends in words that say how to get the report later."""
    from ladezeit.sweep.conductor import write_report
    from ladezeit.sweep.progress import Display

    with Display() as display:
        assert write_report(tmp_path, display) is None
    said = " ".join(capsys.readouterr().out.split())
    assert "no report was written" in said and f"ladezeit-results report {tmp_path}" in said


def test_none_ok_is_exit_code_3(ladezeit: Run, tmp_path: Path) -> None:
    shown = ladezeit(
        *BASE, "loading=transformers", "+loading.engine=engines_for_tests:Raises", "sample=0,1", "tracking=none"
    )
    assert shown.returncode == 2, "an override of a key that is there takes no +"
    shown = ladezeit(*BASE, "loading.engine=engines_for_tests:Raises", "sample=0,1", "tracking=none")
    assert shown.returncode == 3, shown.stdout + shown.stderr
    assert "the engine broke" in shown.stdout


def test_what_breaks_a_sample_costs_no_other(ladezeit: Run, tmp_path: Path, with_store: Callable[[Path], Path]) -> None:
    """A damaged result, a removed folder, a signal without a name: each sample has a result, the sweep is whole."""
    with_store(tmp_path / "outputs")
    engines = ("WritesItsOwnResult", "RemovesItsFolder", "EndsByARealTimeSignal")
    methods = ",".join(f"engines_for_tests:{engine}" for engine in ("Steady", *engines))
    shown = ladezeit(*BASE, f"loading.engine={methods}", "sample=0", "discard_first=false")
    assert shown.returncode == 1, shown.stdout + shown.stderr
    statuses = {r["config"]["loading"]["engine"].partition(":")[2]: r["status"] for r in results(tmp_path)}
    assert statuses == {"Steady": "ok", **dict.fromkeys(engines, "failed"), "EndsByARealTimeSignal": "killed"}
    (parent,), samples = runs(tmp_path)
    assert parent.info.status == "FINISHED" and len(samples) == 4
    assert list((tmp_path / "outputs" / "sweeps").rglob("worker.json")) == []


def test_a_sweep_that_lost_results_is_not_called_finished(
    ladezeit: Run, tmp_path: Path, with_store: Callable[[Path], Path]
) -> None:
    """Whoever removes the folder of a running sweep is told how many samples are missing, in MLflow too."""
    with_store(tmp_path / "outputs")
    engine = "loading.engine=engines_for_tests:RemovesTheSweep"
    shown = ladezeit(*BASE, engine, "sample=0,1", "discard_first=false")
    assert shown.returncode == 3, shown.stdout + shown.stderr
    assert "1 of 2 samples have no result" in shown.stdout and "Traceback" not in shown.stdout + shown.stderr
    (parent,), _ = runs(tmp_path)
    assert parent.info.status == "FAILED"


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 6],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "six times Ctrl-C"],
)
def test_an_interrupted_sweep_keeps_what_it_has_and_says_so(
    tmp_path: Path, with_store: Callable[[Path], Path], numbers: list[signal.Signals]
) -> None:
    """Ctrl-C, however often, and a polite kill: finished samples stay, the running one is `killed`, no run is left
    RUNNING, and no file of the worker stays.
    """
    with_store(tmp_path / "outputs")
    arguments = [*BASE, "loading.engine=engines_for_tests:Steady", "sample=range(20)", "discard_first=false"]
    script = Path(sys.executable).with_name("ladezeit")
    process = subprocess.Popen(
        [str(script), *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while len(results(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert list((tmp_path / "outputs" / "sweeps").rglob("worker.json")) == []
    statuses = [r["status"] for r in results(tmp_path)]
    assert statuses[:2] == ["ok", "ok"] and set(statuses[2:]) <= {"ok", "killed"} and len(statuses) < 20
    (parent,), samples = runs(tmp_path)
    assert parent.info.status == "KILLED"
    assert all(run.info.status != "RUNNING" for run in samples)
    assert "results:" in output and "Load times" in output
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, capture_output=True).stdout == b""


def test_a_store_that_dies_in_mid_sweep_costs_no_measurement(
    tmp_path: Path, with_store: Callable[[Path], Path]
) -> None:
    """The files are the truth: the sweep goes on, says what is not in MLflow, and all results are there."""
    with_store(tmp_path / "outputs")
    arguments = [*BASE, "loading.engine=engines_for_tests:Steady", "sample=range(3)", "discard_first=false"]
    script = Path(sys.executable).with_name("ladezeit")
    process = subprocess.Popen(
        [str(script), *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not results(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    store = tmp_path / "outputs" / "mlflow.db"
    os.truncate(store, 0)
    output, _ = process.communicate(timeout=120)
    assert [r["status"] for r in results(tmp_path)] == ["ok"] * 3
    assert "not in MLflow" in output and "Traceback" not in output
    assert process.returncode == 0, output


def test_a_model_too_large_for_the_machine_gives_way_to_the_smaller_one_and_says_so(
    ladezeit: Run, tmp_path: Path
) -> None:
    """An experiment made for a large machine still answers on a small one; nothing is written to find that out."""
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    model = tmp_path / "conf" / "model" / "large.yaml"
    model.parent.mkdir()
    tiny = (Path(__file__).parents[2] / "conf" / "model" / "tiny.yaml").read_text()
    model.write_text(tiny.replace("name: tiny", "name: large").replace("vocab_size: 8192", "vocab_size: 9000000000"))
    (conf / "large.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /model: large, override /process: prewarmed, override /cache: warm,\n"
        "  override /inference: none]\n"
        "title: large\nsmaller_model: tiny\ndiscard_first: false\nceilings: false\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {sample: '0,1'}}}\n"
    )
    shown = ladezeit("--config-dir", str(conf.parent), "experiment=large", "device=cpu", "tracking=none")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "measuring tiny instead" in shown.stdout and "GiB of host memory" in shown.stdout
    assert [r["config"]["model"]["name"] for r in results(tmp_path)] == ["tiny", "tiny"]


def test_a_sweep_folder_is_never_used_twice(ladezeit: Run, tmp_path: Path) -> None:
    """A second sweep into the same folder would mix its results with the old ones."""
    again = (*BASE, "sample=0,1", "tracking=none", f"hydra.sweep.dir={tmp_path}/mine")
    assert ladezeit(*again).returncode == 0
    before = sorted((tmp_path / "mine").rglob("result.json"))
    shown = ladezeit(*again)
    assert shown.returncode == 2 and "holds a sweep already" in shown.stderr
    assert sorted((tmp_path / "mine").rglob("result.json")) == before


def test_hydras_basic_sweeper_measures_jobs_one_by_one(ladezeit: Run, tmp_path: Path) -> None:
    """Other sweepers run single measurements and are told each one's seconds; no record of ours is needed for that."""
    shown = ladezeit(*BASE, "hydra/sweeper=basic", "loading=transformers,cuda_fp16", "tracking=none")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert [(r["status"], r["identity"]["job"], r["identity"]["sweep"]) for r in results(tmp_path)] == [
        ("ok", 0, None),
        ("ok", 1, None),
    ]


def test_relative_folders_mean_the_same_where_jobs_change_theirs(
    ladezeit: Run, tmp_path: Path, with_store: Callable[[Path], Path]
) -> None:
    """`hydra.job.chdir=true`, Hydra's old default, moves no results and opens no second store; axes in the option
    `hydra.sweeper.params` may come from the command line too, and a time limit may be infinite.
    """
    with_store(tmp_path / "outputs")
    shown = ladezeit(
        *BASE, "outputs=outputs", "hydra.job.chdir=true", "+hydra.sweeper.params.sample='0,1'",
        "discard_first=false", "process.time_limit_s=inf",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert [r["status"] for r in results(tmp_path)] == ["ok", "ok"]
    assert [path.parent for path in tmp_path.rglob("mlflow.db")] == [tmp_path / "outputs"]
    _, samples = runs(tmp_path)
    assert len(samples) == 2


def test_two_sweeps_at_once_into_one_folder_are_one_sweep(tmp_path: Path, ladezeit: Run) -> None:
    """The second is refused at once, without waiting for the device, and changes no file of the first."""
    folder = tmp_path / "mine"
    arguments = (*BASE, "loading.engine=engines_for_tests:Steady", "tracking=none", f"hydra.sweep.dir={folder}")
    script = Path(sys.executable).with_name("ladezeit")
    first = subprocess.Popen([str(script), *arguments, "sample=range(3)", "discard_first=false"], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "sweep.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        before = (folder / "sweep.json").read_bytes()
        shown = ladezeit(*arguments, "sample=7,8")
        assert shown.returncode == 2 and "is in use by another command" in shown.stderr, shown.stderr
        assert first.poll() is None, "it was not waited for"
        assert (folder / "sweep.json").read_bytes() == before
        assert first.wait(120) == 0
    finally:
        first.kill()
        first.wait()
    assert [json.loads(path.read_text())["identity"]["sample"] for path in sorted(folder.glob("?/result.json"))] == [
        0,
        1,
        2,
    ]


def test_a_folder_with_a_run_in_it_is_not_touched_by_another(ladezeit: Run, tmp_path: Path) -> None:
    """What a run was asked for stays readable beside its result: Hydra's own files are not written again."""
    folder = tmp_path / "mine"
    again = ("model=tiny", "device=cpu", "tracking=none", "inference=none", f"hydra.run.dir={folder}")
    assert ladezeit(*again).returncode == 0
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}
    shown = ladezeit(*again, "cache=warm")
    assert shown.returncode == 2 and "holds a result already" in shown.stderr
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")} == before


def test_sweeps_into_folders_of_one_name_are_two_sweeps_in_mlflow(
    ladezeit: Run, tmp_path: Path, with_store: Callable[[Path], Path]
) -> None:
    """`hydra.sweep.dir=<here>/sweep` and `<there>/sweep` share a name, not a parent run: nothing is mixed."""
    with_store(tmp_path / "outputs")
    for place in ("here", "there"):
        shown = ladezeit(*BASE, "sample=0", "discard_first=false", f"hydra.sweep.dir={tmp_path}/{place}/sweep")
        assert shown.returncode == 0, shown.stdout + shown.stderr
    parents, samples = runs(tmp_path)
    assert len(parents) == 2 and len({run.data.tags["ladezeit.sweep"] for run in parents}) == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in samples} == {run.info.run_id for run in parents}


def test_jobs_in_other_processes_join_the_same_sweep(
    ladezeit: Run, tmp_path: Path, with_store: Callable[[Path], Path]
) -> None:
    """With Hydra's joblib launcher each job runs elsewhere: same parent run, one sample at a time on the device."""
    with_store(tmp_path / "outputs")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    shown = ladezeit(*BASE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sample=range(2)")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    (parent,), samples = runs(tmp_path)
    assert [run.data.tags["mlflow.parentRunId"] for run in samples] == [parent.info.run_id] * 2
    ends = sorted((r["started_at"], r["metrics"]["sample/wall_s"]) for r in results(tmp_path))
    assert len(ends) == 2 and ends[0][0] != ends[1][0]


def test_the_command_in_the_result_measures_the_same_point_again(ladezeit: Run, tmp_path: Path) -> None:
    """Whoever doubts a figure copies one line."""
    assert ladezeit(*BASE, "cache=warm", "sample=0,1", "tracking=none").returncode == 0
    first = results(tmp_path)[0]["identity"]
    import shlex

    program, *arguments = shlex.split(first["command"])
    assert program == "ladezeit"
    shown = ladezeit(*arguments)
    assert shown.returncode == 0, shown.stderr
    again = [r for r in results(tmp_path) if r["identity"]["sweep"] is None]
    assert [r["identity"]["point"] for r in again] == [first["point"]]


def test_the_command_of_ones_own_engine_says_where_options_and_code_are(ladezeit: Run, tmp_path: Path) -> None:
    """It works in another shell and another folder, where nobody knows of the option file or of the module."""
    conf = tmp_path / "conf" / "loading"
    conf.mkdir(parents=True)
    schema = "defaults: [/schema/loading/transformers@_here_, _self_]\n"
    (conf / "mine.yaml").write_text(f"{schema}name: mine\nengine: engines_for_tests:Dawdles\n")
    words = ("--config-dir", str(conf.parent), *BASE, "loading=mine", "tracking=none", "sample=0")
    assert ladezeit(*words).returncode == 0
    (first,) = results(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    bare["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), bare["PATH"]])
    for command in (first["identity"]["command"], point_command(Result.from_dict(first), 1)):
        shown = subprocess.run(
            ["bash", "-c", command], cwd=elsewhere, env=bare, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, command + shown.stdout + shown.stderr
