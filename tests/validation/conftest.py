"""Small real models in real checkpoints, loaded by transformers itself."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_qwen2
from transformers import AutoModelForCausalLM

from ladezeit.config import ValidationConfig, ValidationLevel
from ladezeit.loading.base import EngineModel
from ladezeit.timing.clock import Clock
from ladezeit.validation.expected import Expected
from ladezeit.validation.levels import verify_model
from ladezeit.validation.verification import Verification


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 checkpoint of 12 layers whose head is tied to its embedding."""
    folder = tmp_path_factory.mktemp("qwen2")
    tiny_qwen2(tie=True).save_pretrained(folder)
    return folder


@pytest.fixture
def load(checkpoint: Path) -> Callable[..., EngineModel]:
    """Load the checkpoint (or another one) as an engine does."""

    def loaded(folder: Path = checkpoint, **arguments: Any) -> EngineModel:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, **{"dtype": "float16", **arguments}
        )
        device_map = getattr(model, "hf_device_map", None)
        return EngineModel(
            model,
            device_map and {name: str(place) for name, place in device_map.items()},
            missing_keys=sorted(info["missing_keys"]),
            unexpected_keys=sorted(info["unexpected_keys"]),
            mismatched_keys=sorted(str(key) for key in info["mismatched_keys"]),
        )

    return loaded


@pytest.fixture
def expected() -> Expected:
    """One explicit device, the CPU; float16; nothing offloaded."""
    return Expected("cpu", "float16", single_device=True, offload_allowed=False)


@pytest.fixture
def proof() -> Callable[..., Verification]:
    """Prove with a clock of its own."""

    def proven(loaded: EngineModel, expected: Expected, level: str, k: int = 10) -> Verification:
        config = ValidationConfig(level=ValidationLevel(level), k=k)
        return verify_model(loaded, expected, config, Clock(time.monotonic_ns()))

    return proven
