"""The method that a loading profile says for a model: the YAML that a verdict writes, or the origin case's JSON.

What a profile says is checked like any other config; a profile of another machine's device is refused, not bent.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ladezeit.config.compose import from_mapping, read_option
from ladezeit.config.engines import arguments_class
from ladezeit.config.loading import TransformersLoading
from ladezeit.config.run import FolderModel, HubModel, LoadingConfig, ModelConfig, RuntimeConfig
from ladezeit.errors import ConfigError, did_you_mean

_ORIGIN_KEYS = ("device_map", "torch_dtype", "dtype", "disable_cpu_offload", "max_memory")

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ProfileMethod:
    """How a model is to be loaded, the settings measured with it, and the fingerprint of the checkpoint it was measured
    for (see `ladezeit.checkpoint.fingerprint`; None where the profile does not say).
    """

    loading: LoadingConfig
    runtime: RuntimeConfig
    fingerprint: str | None = None


@dataclass(frozen=True)
class Profile:
    """A profile's content by model, read once: lists of entries (YAML) or one mapping (the origin's form)."""

    label: str
    models: Mapping[str, Any]

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "Profile":
        """Read a profile, or take one that was read already; raises `ConfigError` where it is none."""
        if isinstance(source, Mapping):
            return cls("the profile", models_of(source, "the profile"))
        path = Path(source).expanduser()
        return cls(f"profile={path}", read_models(path, f"profile={path}"))

    def method_for(self, model: ModelConfig, device: str, config_dir: Path | None = None) -> ProfileMethod:
        """Return how `model` is to be loaded onto `device` (torch's name).

        Raises:
            ConfigError: the profile does not have the model, or not on such a device, or says what means nothing.
        """
        key = next((key for key in _keys(model) if key in self.models), None)
        if key is None:
            raise ConfigError(
                f"{self.label} has no method for '{model.name}': it has {', '.join(self.models) or 'none'}. Measure it "
                f"(ladezeit -m model=…), or leave profile out." + did_you_mean(model.name, self.models)
            )
        found, told = self.models[key], f"{self.label}, model '{key}'"
        if isinstance(found, Mapping):
            return ProfileMethod(_origin_method(found, device, told), RuntimeConfig())
        entry = _entry(found, device, told)
        fingerprint = entry.get("checkpoint")
        return ProfileMethod(
            _loading(entry, told),
            _runtime(entry.get("overrides", []), told, config_dir),
            None if fingerprint is None else str(fingerprint),
        )


def _keys(model: ModelConfig) -> list[str]:
    """Return the names that a profile may know the model by."""
    keys = [model.name]
    if isinstance(model, HubModel):
        keys.append(model.repo_id)
    if isinstance(model, FolderModel):
        keys.append(model.path)
    return keys


def _entry(entries: Any, device: str, label: str) -> Mapping[str, Any]:
    """Return the best method that was measured on a device of this kind: the first, where cache states differ."""
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{label}: expected a list of entries. Write it again with: ladezeit-results verdict")
    kind = device.partition(":")[0]
    fitting = [entry for entry in entries if str(entry.get("device", "")).partition(":")[0] == kind]
    if not fitting:
        measured = sorted({str(entry.get("device")) for entry in entries})
        raise ConfigError(
            f"{label} was measured on {', '.join(measured)}, and the load is on {kind}: measure it there, or leave "
            f"profile out"
        )
    best = [entry for entry in fitting if (entry.get("evidence") or {}).get("best_of_all_dtypes", True)]
    # A service starts cold more often than warm, and a cold load is what somebody waits for.
    cold = [entry for entry in best if entry.get("cache") == "cold"]
    chosen: Mapping[str, Any] = (cold or best or fitting)[0]
    return chosen


def _loading(entry: Mapping[str, Any], label: str) -> LoadingConfig:
    values = entry.get("loading")
    if not isinstance(values, Mapping) or "engine" not in values:
        raise ConfigError(f"{label}: its entry has no loading with an engine. Write the profile again")
    schema = arguments_class(str(values["engine"]), f"{label}: ")
    return from_mapping(schema, dict(values), f"{label}: loading")


def _runtime(overrides: Any, label: str, config_dir: Path | None) -> RuntimeConfig:
    """Return the performance settings among the words for the command line."""
    runtime = RuntimeConfig()
    values = []
    for word in map(str, overrides):
        key, _, value = word.lstrip("+~").partition("=")
        if key == "runtime":
            runtime = read_option("runtime", value, config_dir)
        elif key.startswith("runtime."):
            values.append(f"{key.removeprefix('runtime.')}={value}")
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(runtime), OmegaConf.from_dotlist(values)))
    except OmegaConfBaseException as cause:
        raise ConfigError(f"{label}: {str(cause).splitlines()[0]}") from cause
    assert isinstance(merged, RuntimeConfig)
    return merged


def _origin_method(entry: Mapping[str, Any], device: str, label: str) -> LoadingConfig:
    values = dict(entry["loading"])
    for key in values:
        if key not in _ORIGIN_KEYS:
            raise ConfigError(
                f"{label}: loading has the key '{key}': there may be {', '.join(_ORIGIN_KEYS)}."
                + did_you_mean(str(key), _ORIGIN_KEYS)
            )
    if "torch_dtype" in values:
        values["dtype"] = values.pop("torch_dtype")
    kind = device.partition(":")[0]
    place = values.get("device_map")
    if place in ("cuda", "cpu"):
        if place != kind:
            raise ConfigError(
                f"{label} says device_map={place}, and the load is on {kind}: pass device='{place}', or leave it out"
            )
        values["device_map"] = "device"
    made = from_mapping(
        TransformersLoading, {"name": "profile", "engine": "transformers", **values}, f"{label}: loading"
    )
    assert isinstance(made, LoadingConfig)
    return made


# The file of a loading profile, read and checked: the YAML that a verdict writes, or the origin case's JSON.


def read_models(path: Path, label: str) -> Mapping[str, Any]:
    """Return what a file says of each model: a list of entries (YAML), or a mapping (the origin's form).

    Args:
        path: of the profile.
        label: what errors call it.

    Raises:
        ConfigError: it cannot be read, or is no profile of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (OSError, ValueError) as cause:
        raise ConfigError(f"{label} cannot be read as a loading profile: {cause}") from cause
    return models_of(document, label)


def models_of(document: Any, label: str) -> Mapping[str, Any]:
    """Return the models of a profile that was parsed already; raises as `read_models` does."""
    if isinstance(document, Mapping) and "schema_version" in document:
        if document["schema_version"] != SCHEMA_VERSION or not isinstance(document.get("models"), Mapping):
            raise ConfigError(
                f"{label} is no loading profile of version {SCHEMA_VERSION}: its schema_version is "
                f"{document['schema_version']!r}. Write it again with: ladezeit-results verdict --write-profile"
            )
        models: Mapping[str, Any] = document["models"]
        return models
    if isinstance(document, Mapping) and document and all(is_origin(entry) for entry in document.values()):
        return document
    raise ConfigError(
        f"{label} is no loading profile: neither what ladezeit-results verdict writes (schema_version, models) nor "
        f'{{"model": {{"loading": {{…}}}}}}'
    )


def is_origin(entry: Any) -> bool:
    """Whether a model's entry has the origin's form."""
    return isinstance(entry, Mapping) and isinstance(entry.get("loading"), Mapping)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise ValueError(str(cause)) from cause
