"""A loading profile as a manager's configuration: each model by the method that was measured to be the best."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ladezeit import ModelManager
from ladezeit.errors import ConfigError

Config = Callable[..., dict[str, Any]]


def entry(method: str, *words: str) -> dict[str, Any]:
    """Return what a verdict writes for a method that was measured on a CPU."""
    loading = {"name": method, "engine": method, "dtype": "auto", "disable_cpu_offload": True, "threads": None}
    return {
        "device": "cpu",
        "dtype": "bfloat16",
        "cache": "warm",
        "method": method,
        "overrides": [f"loading={method}", *words],
        "loading": loading,
        "evidence": {"best_of_all_dtypes": True},
    }


def written(folder: Path, models: dict[str, Any]) -> Path:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump({"schema_version": 1, "models": models}))
    return path


def test_a_model_is_loaded_by_the_method_of_its_profile(tmp_path: Path) -> None:
    """And with the performance settings that it was measured with, applied once."""
    import torch

    before = torch.get_num_threads()
    path = written(tmp_path, {"tiny": [entry("safetensors_mmap", "runtime.threads=1")]})
    try:
        manager = ModelManager(path)
        loaded = manager.get("tiny")
        assert loaded.config.loading.engine == "safetensors_mmap"
        assert manager.status().models["tiny"].method == "safetensors_mmap"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_settings_that_a_process_cannot_have_both_are_refused(tmp_path: Path) -> None:
    """Two models that were measured with different settings of the process cannot both be as fast as measured."""
    models = {
        "tiny": [entry("safetensors_mmap", "runtime.threads=1")],
        "smollm2-135m": [entry("safetensors_mmap", "runtime.threads=2")],
    }
    with pytest.raises(ConfigError, match=r"a process has one set of performance settings"):
        ModelManager(written(tmp_path, models))


def test_a_damaged_profile_is_refused_when_the_manager_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no models"):
        ModelManager(written(tmp_path, {}))


def test_the_attention_that_was_asked_for_is_the_one_that_runs(origin_config: Config) -> None:
    manager = ModelManager({"runtime": {"attn_implementation": "eager"}, **origin_config("ape")})
    assert manager.get("ape").effective["attention"] == "eager"
