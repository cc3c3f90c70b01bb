"""Samples of a tiny model, for tests of what becomes of their processes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs_for_tests import make_run_config
from ladezeit.config import TransformersLoading
from ladezeit.results.records import Identity, Result
from ladezeit.runner.spec import WorkerSpec
from ladezeit.runner.supervisor import Supervisor
from ladezeit.system.page_cache import set_state


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with Supervisor() as one:
        yield one


@pytest.fixture
def measure(supervisor: Supervisor, own_tiny: Any, tmp_path: Path) -> Callable[..., Result]:
    """Measure one sample of model=tiny into `tmp_path`."""

    def run(engine: str = "transformers", progress: Any = lambda phase: None, **changes: Any) -> Result:
        loading = TransformersLoading(name=engine, device_map="device")
        loading.engine = engine if engine == "transformers" else f"engines_for_tests:{engine}"
        config = make_run_config(tmp_path, **({"loading": loading} | changes))
        identity = Identity("0" * 12, 0, 0, "test", [], "ladezeit")
        spec = WorkerSpec(config, own_tiny, identity, config.device, tmp_path, environment={"from": "the supervisor"})
        set_state(own_tiny.shards, config.cache.state)
        return supervisor.run_sample(spec, progress)

    return run
