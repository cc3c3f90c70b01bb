"""Configs as plain data and back: the way into result files, and to a worker; and the id of what a config measures."""

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import OmegaConf

from ladezeit.config.engines import find_engines
from ladezeit.config.loading import TransformersLoading
from ladezeit.config.run import (
    NOT_MEASURED,
    FolderModel,
    HubModel,
    LoadConfig,
    LoadingConfig,
    ModelConfig,
    PackagedModel,
    RunConfig,
    SyntheticModel,
)
from ladezeit.errors import ConfigError


def to_plain(config: LoadConfig) -> dict[str, Any]:
    """Return `config` as plain dicts, lists, strings and numbers (enums by name), ready for JSON."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


def from_plain(plain: dict[str, Any]) -> RunConfig:
    """Rebuild the objects that `to_plain` flattened; the worker's way to its config."""
    groups = {
        "model": _model_class(plain["model"]),
        "loading": _loading_class(plain["loading"]),
    }
    node = OmegaConf.structured(RunConfig)
    for key, cls in groups.items():
        node[key] = OmegaConf.structured(cls)
    config = OmegaConf.to_object(OmegaConf.merge(node, plain))
    assert isinstance(config, RunConfig)
    return config


def _loading_class(plain: dict[str, Any]) -> type[LoadingConfig]:
    """Return an engine's schema; that of a user's own engine is the one whose arguments it was given."""
    known = find_engines()
    if plain["engine"] in known:
        return known[plain["engine"]].arguments
    fitting = [facts.arguments for facts in known.values() if {f.name for f in fields(facts.arguments)} == set(plain)]
    return min(fitting, key=lambda cls: len(cls.__mro__), default=TransformersLoading)


def _model_class(plain: dict[str, Any]) -> type[ModelConfig]:
    for cls in (HubModel, FolderModel, PackagedModel, SyntheticModel):
        if set(cls.__dataclass_fields__) == set(plain):
            return cls
    raise ConfigError(f"model has the keys {sorted(plain)}, which fit no kind of model")


def point_id(config: LoadConfig) -> str:
    """Return 12 hexadecimal digits that are equal for configs that measure the same thing."""
    measured = {key: value for key, value in to_plain(config).items() if key not in NOT_MEASURED}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:12]
