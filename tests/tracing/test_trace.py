"""`ladezeit.trace`: a user's own load function is measured as it is, its time is named, its model is proven."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ladezeit
import own_loaders
from ladezeit.analysis.eligibility import unverified_reason
from ladezeit.cli.trace import resolve_loader, write_option
from ladezeit.errors import ConfigError, LadezeitError
from ladezeit.loading.engines.traced import import_loader
from ladezeit.results.reader import read_paths
from ladezeit.results.records import Result, Status
from ladezeit.tracing.api import Trace, checkpoint_words

ROOT = Path(__file__).parents[2]
QUICK = ["device=cpu", "ceilings=off"]


@pytest.fixture
def traced(tiny: Any, tmp_path: Path) -> Callable[..., Result]:
    """Trace a loader of the checkpoint once, in this process."""

    def trace(load: Any, *overrides: str) -> Result:
        found = ladezeit.trace(load, tiny.folder, output=tmp_path / "out", overrides=[*QUICK, *overrides])
        return found.results[0]

    return trace


def own_s(result: Result) -> dict[str, float]:
    """Return the own time of each phase of the load, together where one comes several times."""
    times: dict[str, float] = {}
    for phase in result.phases:
        if phase.path.startswith("load"):
            times[phase.path] = times.get(phase.path, 0.0) + phase.self_s
    return times


def test_own_functions_and_marks_are_phases_that_add_up(traced: Callable[..., Result]) -> None:
    """Each function has its own time with file and line, beside transformers' own steps, and nothing is lost."""
    result = traced(own_loaders.plain)
    assert result.status is Status.ok, result.error
    times = own_s(result)
    assert 0.3 <= times["load/own_loaders:wait"] < 1 and 0.2 <= times["load/warm up"] < 1
    assert {"load/own_loaders:plain", "load/read", "load/skeleton", "load/touch"} <= set(times)
    assert sum(times.values()) == pytest.approx(result.metrics["load/total_s"], abs=1e-6)
    assert result.effective["functions"]["load/own_loaders:wait"].startswith(own_loaders.__file__ + ":")
    assert own_loaders.wait.__module__ == "own_loaders" and not hasattr(own_loaders.wait, "__wrapped__"), "put back"


def test_the_model_is_proven_like_any_other(traced: Callable[..., Result]) -> None:
    """One changed value in what the user's function returns is found, and named."""
    result = traced(own_loaders.forgets_a_weight, "validation=content")
    assert result.status is Status.wrong and "model.norm.weight" in str(result.proof)


def test_a_loader_is_called_as_it_is_written(traced: Callable[..., Result]) -> None:
    """Device and dtype are given to a loader with such parameters; the model may come in a dict."""
    result = traced(own_loaders.asks_for_everything, "loading.dtype=float32")
    assert result.status is Status.ok, result.error
    assert (result.effective["dtype"], unverified_reason(result)) == ("float32", None)


def test_a_managers_methods_are_named_with_their_class(traced: Callable[..., Result]) -> None:
    """A bound, decorated method works, and so does a class method that it calls; the model is its attribute."""
    result = traced(own_loaders.Manager().load)
    assert result.status is Status.ok, result.error
    assert {"load/own_loaders:Manager.load", "load/own_loaders:Manager.settle"} <= set(own_s(result))


def test_a_partial_a_thread_and_a_crowd_of_short_calls(traced: Callable[..., Result], tmp_path: Path) -> None:
    """Other threads disturb no phase; a function that is called thousands of times does not pay for being timed."""
    result = traced(functools.partial(own_loaders.in_threads))
    assert result.status is Status.ok, result.error
    assert "load/read" not in own_s(result) and own_s(result)["load/own_loaders:in_threads"] > 0.5
    (tmp_path / "out" / "0").rename(tmp_path / "before")
    result = traced(own_loaders.many_short_calls)
    assert result.effective["functions_joined"] == ["load/own_loaders:short"]
    assert "load/own_loaders:short" not in own_s(result)
    assert sum(own_s(result).values()) == pytest.approx(result.metrics["load/total_s"], abs=1e-6)


def test_what_is_no_model_is_an_error_that_says_what_to_return(traced: Callable[..., Result]) -> None:
    result = traced(own_loaders.returns_no_model)
    assert result.status is Status.wrong and "returned str, in which there is no model" in str(result.reason)


def test_repeats_are_results_that_the_other_commands_read(tiny: Any, tmp_path: Path) -> None:
    """Two calls, two result files, a summary that names the time; nothing is overwritten."""
    found: Trace = ladezeit.trace(
        own_loaders.plain, "tiny", name="our manager", repeats=2, output=tmp_path, overrides=QUICK
    )
    assert len(read_paths([tmp_path]).results) == 2
    assert found.results[0].config["loading"]["name"] == "our manager"
    assert (
        "our manager takes" in str(found)
        and "own_loaders:wait" in str(found)
        and "verification: placement" in str(found)
    )
    with pytest.raises(LadezeitError, match="nothing measured is overwritten"):
        ladezeit.trace(own_loaders.plain, "tiny", output=tmp_path, overrides=QUICK)


def test_import_and_marks_are_free_where_nothing_measures() -> None:
    """A service may import ladezeit and mark its phases: no torch comes with it, and the mark does nothing."""
    program = (
        "import sys, ladezeit\n"
        "with ladezeit.phase('validation'): pass\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules\n"
        "assert ladezeit.phase('a') is ladezeit.phase('b')\n"
        "try: ladezeit.nothing\n"
        "except AttributeError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "has no attribute 'nothing'" in shown.stdout


@pytest.mark.parametrize(
    "ask, said",
    [
        (lambda: import_loader("own_loaders:missing"), "'own_loaders' has no 'missing'"),
        (lambda: import_loader("no_such_module_at_all:load"), "cannot be imported"),
        (lambda: import_loader("own_loaders:__name__"), "cannot be called"),
        (lambda: resolve_loader("just_a_word"), "names no function"),
        (lambda: resolve_loader("/nowhere/loader.py:load"), "there is no file"),
        (lambda: write_option(Path("/tmp"), "streamed", "a:b"), "loading method of ladezeit's own"),
        (lambda: checkpoint_words("tyni"), "Did you mean 'tiny'"),
        (lambda: ladezeit.trace(own_loaders.plain, "tiny", repeats=0), "repeats=0"),
        (lambda: ladezeit.trace(own_loaders.plain, "tiny", overrides=["cache=clod"]), "Did you mean 'cold'"),
    ],
)
def test_wrong_input_is_refused_with_what_to_do(ask: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ask()


def test_a_file_in_a_package_is_imported_by_its_full_name(tmp_path: Path) -> None:
    package = tmp_path / "service" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "manager.py").touch()
    assert resolve_loader(f"{package}/manager.py:Manager.load") == ("service.models.manager:Manager.load", tmp_path)


@pytest.mark.slow
def test_the_verdict_names_the_walk_and_clears_the_settings(tiny: Any, tmp_path: Path) -> None:
    """The origin case in small: good settings, a slow manager; the words name its function, its file and its line."""
    words = ["--checkpoint", str(tiny.folder), "--name", "ours", "--output", str(tmp_path / "traced")]
    words += ["process=prewarmed", "inference=none", "tracking=none", "discard_first=off", *QUICK]
    loader = f"{ROOT}/examples/slow_manager.py:ModelManager.load"
    shown = subprocess.run(
        [sys.executable, "-m", "ladezeit.cli.trace", loader, *words],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "are spent in load/slow_manager:ModelManager._walk_all_modules (" in shown.stdout
    assert "slow_manager.py:" in shown.stdout and "the settings are not the cause" in shown.stdout
    assert "Where ours has to stay, remove load/slow_manager:ModelManager._walk_all_modules from it" in shown.stdout
    slow = [r for r in read_paths([tmp_path / "traced"]).results if r.config["loading"]["name"] == "ours"]
    assert all(r.status is Status.ok and unverified_reason(r) is None for r in slow)
    assert len({r.identity.point for r in slow}) == 1 and len(slow) == 5
