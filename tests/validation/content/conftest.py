"""A real checkpoint with its manifest, and engines to load it by."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from proven_checkpoints import UP, flip_in_file, made, manifest_of, own_copy

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import DType, ValidationConfig, ValidationLevel
from ladezeit.config.engines import arguments_class
from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.registry import make_engine
from ladezeit.timing.clock import LOAD, Clock
from ladezeit.validation import manifest
from ladezeit.validation.expected import Expected
from ladezeit.validation.levels import verify_model
from ladezeit.validation.verification import Verification


@pytest.fixture(autouse=True)
def warm(warm_references: None) -> None:
    """Manifests are made in forks of a warm process; only `damaged` pays for the start of a new one."""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., EngineModel]:
    """Load a checkpoint by an engine, as a worker does."""

    def loaded(checkpoint: Checkpoint, name: str = "transformers", **arguments: Any) -> EngineModel:
        loading = arguments_class(name)(name=name, engine=name, **arguments)
        request = LoadRequest(checkpoint, loading, "cpu", tmp_path)
        clock = Clock(time.monotonic_ns())
        chosen = make_engine(name)
        chosen.prepare(request)
        with clock.span(LOAD):
            return chosen.load(request, clock)

    return loaded


@pytest.fixture
def proof(cache: Path) -> Callable[..., Verification]:
    """Prove the content of what was loaded by the manifest of a checkpoint as it was before a test damaged it."""

    def proven(loaded: EngineModel, file: Path, dtype: DType = DType.bfloat16, **changes: Any) -> Verification:
        asked = SimpleNamespace(single_device=True, offload_allowed=False)
        asked.__dict__.update(changes)
        expected = Expected("cpu", dtype.value, **vars(asked), manifest=manifest.read_manifest(file))
        return verify_model(loaded, expected, ValidationConfig(ValidationLevel.content), Clock(time.monotonic_ns()))

    return proven


@pytest.fixture(scope="session")
def damaged(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A checkpoint in whose file a bit flipped after its manifest was made, and that manifest."""
    copy = own_copy(made("tied", cache), tmp_path_factory.mktemp("damaged") / "copy")
    file = manifest_of(copy, cache)
    flip_in_file(copy, UP)
    return copy, file
