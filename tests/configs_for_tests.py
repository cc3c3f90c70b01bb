"""Configs as tests need them: one model's, and a whole run's of model=tiny."""

from pathlib import Path
from typing import Any

from ladezeit.config import (
    CacheConfig,
    CacheState,
    InferenceConfig,
    ProcessConfig,
    ProcessKind,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
    TrackingKind,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
)

HERE = Path(__file__).parent


def model_config(name: str) -> Any:
    """Return the model config that an option file composes to."""
    from omegaconf import OmegaConf

    from ladezeit.config import FolderModel, HubModel, PackagedModel, SyntheticModel

    plain = OmegaConf.load(HERE.parent / "conf" / "model" / f"{name}.yaml")
    kind = str(plain.pop("defaults")[0]).rpartition("/")[2].partition("@")[0]
    schema = {"hub": HubModel, "folder": FolderModel, "packaged": PackagedModel, "synthetic": SyntheticModel}[kind]
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))


def make_run_config(outputs: Path, **changes: Any) -> RunConfig:
    """Return a run config of model=tiny on the CPU; `changes` replace whole groups or keys."""
    fields: dict[str, Any] = {
        "model": model_config("tiny"),
        "loading": TransformersLoading(name="transformers", device_map="device"),
        "validation": ValidationConfig(ValidationLevel.placement),
        "cache": CacheConfig(CacheState.as_is),
        "inference": InferenceConfig(new_tokens=3, token_ids=[1, 2, 3]),
        "runtime": RuntimeConfig(),
        "process": ProcessConfig(ProcessKind.prewarmed, time_limit_s=120),
        "tracking": TrackingConfig(TrackingKind.none),
        "device": "cpu",
        "sample": 0,
        "phases": True,
        "order_seed": 0,
        "discard_first": False,
        "outputs": str(outputs),
    }
    return RunConfig(**(fields | changes))
