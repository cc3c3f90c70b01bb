"""`profile=true`: a person sees which function takes the time, and no profiled figure is ever compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs_for_tests import make_run_config
from ladezeit.analysis.eligibility import unverified_reason
from ladezeit.config import ProcessConfig, ProcessKind, TransformersLoading
from ladezeit.errors import LadezeitError
from ladezeit.loading.engines.tensor_parallel import TensorParallelLoading
from ladezeit.redaction import redact_text
from ladezeit.report.sample_view import as_rich
from ladezeit.results.reader import read_paths
from ladezeit.results.records import Identity, Result, Status, read_result
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.timing import profiler
from ladezeit.tracking.mlflow_tracker import collect_files


@pytest.fixture(scope="module")
def profiled(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A profiled load by an engine that spends its time in one function, and its folder."""
    folder = tmp_path_factory.mktemp("profiled")
    loading = TransformersLoading(name="dawdles", engine="engines_for_tests:Dawdles", device_map="device")
    config = make_run_config(folder, loading=loading, process=ProcessConfig(ProcessKind.inline), profile=True)
    with Supervisor() as supervisor:
        result = supervisor.run_sample(
            WorkerSpec(config, tiny, Identity("p", 0, 0, "test", [], "ladezeit"), "cpu", folder)
        )
    assert result.status is Status.ok, result.error
    return result, folder


def test_the_function_that_takes_the_time_is_named(profiled: tuple[Result, Path]) -> None:
    """The load's largest own time has a name, a file and a line; validation is counted apart."""
    found = profiled[0].effective["profile"]["functions"]
    named = [entry for entry in found["load"] if entry["function"] == "engines_for_tests:Dawdles._count"]
    assert named and named[0] is found["load"][0] and ".py:" in named[0]["place"]
    assert named[0]["own_s"] > 0.5 * profiled[0].metrics["load/total_s"]
    assert not any("Dawdles" in entry["function"] for entry in found["validation"])


def test_the_flame_graph_and_the_speedscope_file_are_there(profiled: tuple[Result, Path], tmp_path: Path) -> None:
    """Both open without a network, and both go to MLflow whole and unchanged."""
    folder = profiled[1]
    page = (folder / profiler.PAGE_FILE).read_text()
    assert "_count" in page and "googleapis" not in page and redact_text(page) == page
    frames = json.loads((folder / profiler.SPEEDSCOPE_FILE).read_text())["shared"]["frames"]
    assert any("_count" in frame["name"] for frame in frames)
    assert {profiler.PAGE_FILE, profiler.SPEEDSCOPE_FILE} <= collect_files(profiled[0], folder, tmp_path)


def test_a_profiled_sample_is_shown_and_never_ranked(profiled: tuple[Result, Path]) -> None:
    """`show` names function and files; `compare` and `verdict` leave the sample out and say why."""
    from rich.console import Console

    result, folder = profiled
    assert read_result(folder).config["profile"] is True and "profiler" in str(unverified_reason(result))
    with pytest.raises(LadezeitError, match="measured under a profiler"):
        read_paths([folder])
    screen = Console(record=True, width=200)
    screen.print(as_rich(read_paths([folder], with_profiled=True).results[0], str(folder)))
    shown = screen.export_text()
    assert "engines_for_tests:Dawdles._count" in shown and profiler.PAGE_FILE in shown and "not ranked" in shown


def test_a_missing_profiler_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "find_spec", lambda name: None)
    with pytest.raises(LadezeitError, match=r"pip install 'ladezeit\[profile\]'"):
        profiler.check_installed()


def test_several_processes_are_not_profiled_in_silence(tmp_path: Path) -> None:
    from ladezeit.config.rules import check_combination

    loading = TensorParallelLoading(name="tensor_parallel")
    config = make_run_config(tmp_path, loading=loading, process=ProcessConfig(ProcessKind.fresh), profile=True)
    with pytest.raises(LadezeitError, match="several processes"):
        check_combination(config)
