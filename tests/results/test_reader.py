"""Reading what was measured: every file counts or is named, wherever it lies."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import planted
from ladezeit.analysis.comparison import compare_points
from ladezeit.analysis.eligibility import level_of, machine_of, unverified_reason
from ladezeit.config import NOT_MEASURED, TrackingConfig, TrackingKind
from ladezeit.errors import LadezeitError
from ladezeit.results import fields
from ladezeit.results.reader import Samples, read_paths
from ladezeit.results.records import FILE_NAME, Status, SweepRecord, read_result
from ladezeit.tracking import SweepStatus, open_tracker
from ladezeit.tracking.reader import read_experiment


def test_a_sweep_several_sweeps_and_single_results_are_read_alike(tmp_path: Path) -> None:
    one = planted.write(tmp_path / "one", planted.sweep(samples=2))
    other = planted.write(tmp_path / "other", [planted.sample("later", 0, 1.0, job=50)])
    assert len(read_paths([one]).results) == 14
    assert len(read_paths([one, other]).results) == 15
    assert len(read_paths([tmp_path]).sweeps) == 2
    single = read_paths([one / "0" / FILE_NAME])
    assert len(single.results) == 1 and single.places == [str(one / "0")]


def test_damaged_foreign_and_doubled_files_are_named(tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", planted.sweep(samples=2), planned=20)
    (folder / "0" / FILE_NAME).write_text('{"schema_version": 1, "status"')
    (folder / "1" / FILE_NAME).write_text('{"hello": "from another tool"}')
    (folder / "2" / FILE_NAME).write_text(
        json.dumps({**json.loads((folder / "2" / FILE_NAME).read_text()), "metrics": 7})
    )
    shutil.copytree(folder / "3", folder / "copy-of-3")
    found = read_paths([folder])
    assert len(found.results) == 11 and found.missing == 9
    assert [Path(line.split(":")[0]).parent.name for line in found.unreadable] == ["0", "1", "2"]
    assert "schema version None" in found.unreadable[1]
    assert len(found.left_out) == 1 and "the same sample" in found.left_out[0]


def test_the_warm_up_and_profiled_samples_are_left_out_and_named(tmp_path: Path) -> None:
    made = planted.sweep(samples=2, bad=False)
    made[0].identity = type(made[0].identity)(**{**made[0].identity.__dict__, "job": -1})
    made[1].config["profile"] = True
    found = read_paths([planted.write(tmp_path / "sweep", made)])
    assert len(found.results) == 6
    assert set(found.left_out_by_reason()) == {
        "the discarded first sample of a sweep",
        "measured under a profiler",
    }


def test_a_damaged_record_of_a_sweep_is_named(tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", planted.sweep(samples=1))
    (folder / "sweep.json").write_text("{")
    found = read_paths([folder])
    assert found.results and "sweep.json is not the record of a sweep" in found.unreadable[0]


@pytest.mark.parametrize("name", ["missing", "empty", "text.json"])
def test_nothing_to_read_is_said_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(LadezeitError, match=r"outputs/sweeps|does not exist|cannot be read"):
        read_paths([tmp_path / name])


def test_what_varies_is_found_without_a_record() -> None:
    made = planted.sweep(samples=1, bad=False)
    threads = planted.sample("cuda_fp16", 0, 1.0)
    threads.config["loading"]["threads"] = 8
    threads.identity = type(threads.identity)(**{**threads.identity.__dict__, "point": "other"})
    assert fields.infer_varying_keys([*made, threads]) == ["loading", "loading.threads"]
    assert fields.infer_varying_keys(made, ["loading"]) == ["loading"]


def test_what_does_not_change_a_measurement_is_the_same_here_as_in_the_config() -> None:
    assert set(fields.NOT_MEASURED) == set(NOT_MEASURED)


def test_five_thousand_samples_are_compared_rightly(tmp_path: Path) -> None:
    """Every second of 500 methods is planted 1.5 times slower: all of those, and only those, fall behind."""
    made = []
    for number in range(10):
        for method in range(500):
            result = planted.sample(f"m{method}", number, 1.0 + 0.5 * (method % 2), job=len(made), noise=0.005)
            made.append(result)
    compared = compare_points(made, ["loading"])
    ranked = compared.sections[0].ranked
    slow = {point.values["loading"] for point in ranked[250:]}
    assert len(ranked) == 500 and slow == {f"m{method}" for method in range(1, 500, 2)}
    ratios = [point.ratio.estimate for point in ranked if point.ratio is not None]
    assert len(ratios) == 499 and min(ratios) > 0.97, "all but the first are compared with it"
    folder = planted.write(tmp_path / "sweep", made[:1000])
    assert len(read_paths([folder]).results) == 1000


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, with_store: Callable[[Path], Path]) -> tuple[Path, Samples]:
    """An outputs folder whose store holds a planted sweep, and what lies in its files."""
    outputs = with_store(tmp_path_factory.mktemp("outputs"))
    folder = planted.write(outputs / "sweeps" / "one", planted.sweep(samples=5))
    tracker = open_tracker(TrackingConfig(kind=TrackingKind.sqlite, experiment="planted"), outputs)
    record = tracker.begin_sweep(SweepRecord.read_record(folder), folder)
    for job in sorted(int(own.name) for own in folder.iterdir() if own.is_dir()):
        tracker.log_sample(read_result(folder / str(job)), folder / str(job), record, record.varying)
    tracker.end_sweep(record, SweepStatus.FINISHED, "")
    return outputs, read_paths([folder])


def test_an_experiment_says_the_same_as_the_files(experiment: tuple[Path, Samples]) -> None:
    outputs, files = experiment
    found = read_experiment("planted", f"sqlite:///{outputs / 'mlflow.db'}")
    assert not found.unreadable and len(found.results) == len(files.results) == 35
    kept = [compare_points(own.results, ["loading"]).sections[0] for own in (found, files)]
    assert [(p.name, p.rank, p.spread, p.p) for p in kept[0].ranked] == [
        (p.name, p.rank, p.spread, p.p) for p in kept[1].ranked
    ]


def test_a_run_whose_file_is_gone_is_read_from_its_tags(experiment: tuple[Path, Samples]) -> None:
    outputs, files = experiment
    copies = (outputs / "artifacts").rglob(f"artifacts/{FILE_NAME}")
    gone = next(path for path in copies if json.loads(path.read_text())["status"] == "ok")
    kept = gone.read_text()
    gone.unlink()
    try:
        found = read_experiment("planted", f"sqlite:///{outputs / 'mlflow.db'}")
    finally:
        gone.write_text(kept)
    assert len(found.results) == 35 and not found.unreadable
    own = next(result for result in found.results if result.status is Status.ok and not result.phases)
    twin = next(result for result in files.results if result.identity.job == own.identity.job)
    assert own.identity.point == twin.identity.point and level_of(own) == level_of(twin)
    assert own.metrics["load/total_s"] == pytest.approx(twin.metrics["load/total_s"], rel=1e-5)
    assert machine_of(own) == machine_of(twin) and unverified_reason(own) == unverified_reason(twin)
    assert own.config["loading"]["name"] == twin.config["loading"]["name"]


def test_a_damaged_artifact_is_named(experiment: tuple[Path, Samples]) -> None:
    outputs, _ = experiment
    bad = next((outputs / "artifacts").rglob(f"artifacts/{FILE_NAME}"))
    kept = bad.read_text()
    bad.write_text("{")
    try:
        found = read_experiment("planted", f"sqlite:///{outputs / 'mlflow.db'}")
    finally:
        bad.write_text(kept)
    assert len(found.results) == 34 and found.unreadable[0].startswith(f"run {bad.parents[1].name}")


def test_an_experiment_that_is_not_there_is_said_with_those_that_are(experiment: tuple[Path, Samples]) -> None:
    outputs, _ = experiment
    with pytest.raises(LadezeitError, match=r"no experiment 'plantd'.*Did you mean 'planted'"):
        read_experiment("plantd", f"sqlite:///{outputs / 'mlflow.db'}")
    with pytest.raises(LadezeitError, match=r"there is no store at /nowhere/mlflow\.db"):
        read_experiment("planted", "sqlite:////nowhere/mlflow.db")


def test_neither_torch_nor_mlflow_is_imported_for_files(tmp_path: Path) -> None:
    folder = planted.write(tmp_path / "sweep", planted.sweep())
    code = (
        "import sys\nfrom ladezeit.cli.results import app\n"
        f"app(['verdict', {str(folder)!r}], standalone_mode=False)\n"
        "bad = {'torch', 'mlflow', 'transformers', 'hydra', 'scipy'} & set(sys.modules)\nassert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
