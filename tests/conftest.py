"""What tests share: a cache folder for checkpoints that lasts one run, a tiny checkpoint, a session of samples."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from configs_for_tests import model_config
from warm_processes import answer_apart

HERE = Path(__file__).parent

# A shell that starts the tests in the background has SIGINT ignored, and so would every process under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is.
settings.register_profile("ladezeit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ladezeit")

# Engines of the tests are found by workers too, and nothing that a test makes lands in the user's own cache.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that checkpoints are made in, new for each test run."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LADEZEIT_CACHE")
    os.environ["LADEZEIT_CACHE"] = str(folder)
    yield folder
    os.environ.pop("LADEZEIT_CACHE")
    if before is not None:
        os.environ["LADEZEIT_CACHE"] = before


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Any:
    """The checkpoint of model=tiny."""
    from ladezeit.checkpoint.resolve import prepare_checkpoint

    return prepare_checkpoint(model_config("tiny"), cache)


@pytest.fixture
def own_tiny(tiny: Any, tmp_path: Path) -> Any:
    """A copy of it for one test: files that another test has mapped cannot be dropped from the page cache."""
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "own" / tiny.folder.name))
    return replace(tiny, folder=folder, shards=tuple(folder / path.relative_to(tiny.folder) for path in tiny.shards))


@pytest.fixture(scope="session")
def supervisor() -> Iterator[Any]:
    """One supervisor for many samples, as in a sweep: its workers are forked from one server that is warm."""
    from ladezeit.runner.supervisor import Supervisor

    with Supervisor() as supervisor:
        yield supervisor


@pytest.fixture(scope="session")
def with_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Put an MLflow store that holds nothing yet into an outputs folder, which is returned.

    MLflow takes seconds to create one; here that is done once, for all tests that are not about it.
    """
    from ladezeit.tracking.store import DATABASE_FILE, client_class

    empty = tmp_path_factory.mktemp("store") / DATABASE_FILE
    client_class()(f"sqlite:///{empty}").search_experiments(max_results=1)

    def put(outputs: Path) -> Path:
        outputs.mkdir(parents=True, exist_ok=True)
        shutil.copy(empty, outputs / DATABASE_FILE)
        return outputs

    return put


@pytest.fixture
def warm_references(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """References and conversions are made in forks of a warm process: one each, without the seconds of imports.

    Those for a GPU are not: imports of the warm process may have asked for it, after which no fork can have it.
    """
    if request.node.get_closest_marker("gpu"):
        return
    from ladezeit.system import processes

    monkeypatch.setattr(processes, "run_module", answer_apart)


@pytest.fixture
def ladezeit(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed console script as a user would, from a folder of its own."""
    script = Path(sys.executable).with_name("ladezeit")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(script), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return run
