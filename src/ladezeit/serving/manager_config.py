"""What a `ModelManager` is told, from its file or mapping to typed settings; nothing else of it is ever read again.

Two forms are understood: the case study's JSON, keyed by the model's name, and the loading profile in YAML that
``ladezeit-results verdict --write-profile`` writes. Every key is known or an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ladezeit.config import STRATEGIES, MatmulPrecision, RuntimeConfig, ValidationLevel
from ladezeit.errors import ConfigError, did_you_mean

#: The document's own key beside the names of models: process-wide performance settings.
RUNTIME = "runtime"

#: What may stand for a model, in the origin's form.
_MODEL_KEYS = ("loading", "model", "path", "validation", "device")

#: What may stand in ``loading``; `torch_dtype` and `dtype` are one thing, `method` an option of the group `loading`.
_LOADING_KEYS = ("device_map", "torch_dtype", "dtype", "disable_cpu_offload", "max_memory", "offload_folder", "method")

_DTYPES = ("auto", "float32", "float16", "bfloat16")

#: One explicit device leaves the method free; a strategy is an argument of `from_pretrained`.
_AUTO = "auto"
_FROM_PRETRAINED = "transformers"


@dataclass(frozen=True)
class ModelSettings:
    """How one model is loaded: the arguments of `ladezeit.load`.

    `source` is a configured name, a folder or a hub id. `method` is an option of the group `loading`, `arguments` are
    what is said besides, or without it; both are empty where `profile`, a parsed loading profile, says how.
    `max_memory` is there for strategies only.
    """

    name: str
    source: str
    device: str = "auto"
    method: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] | None = field(default=None, repr=False)
    validation: str = ValidationLevel.placement.value
    max_memory: dict[str, str] | None = None
    allow_offload: bool = False


@dataclass(frozen=True)
class ManagerSettings:
    """All models of a manager by name, in the order of the document, and the process's performance settings.

    `runtime` is None where the profile says it, for each model.
    """

    models: dict[str, ModelSettings]
    runtime: RuntimeConfig | None


def read_settings(
    config: Mapping[str, Any] | str | Path, validation: str = ValidationLevel.placement.value
) -> ManagerSettings:
    """Return the settings in a mapping, or in the file at a path, which is opened once.

    `validation` is the level of the models that do not say theirs.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or values do not go together.
    """
    if isinstance(config, Mapping):
        return _of_document(config, "the manager's configuration", validation)
    path = Path(config)
    return _of_document(_document(path), str(path), validation)


def _document(path: Path) -> dict[str, Any]:
    from ladezeit.checkpoint.files import parse_object
    from ladezeit.errors import CheckpointError

    try:
        raw = path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"the manager's configuration {path} cannot be read: {cause.strerror}") from cause
    if path.suffix not in (".yaml", ".yml"):
        try:
            return parse_object(raw, str(path))
        except CheckpointError as cause:
            raise ConfigError(str(cause)) from cause
    import yaml

    try:
        document = yaml.safe_load(raw)
    except (ValueError, yaml.YAMLError) as cause:
        raise ConfigError(f"{path} is not valid YAML: {cause}") from cause
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not valid: expected models by name, found {type(document).__name__}")
    return document


def _of_document(document: Mapping[str, Any], what: str, validation: str) -> ManagerSettings:
    _check_word(validation, [level.value for level in ValidationLevel], "validation")
    if "schema_version" in document:
        return _of_profile(document, what, validation)
    runtime = _runtime(document.get(RUNTIME, {}), f"{what}: {RUNTIME}")
    models = {name: _model(str(name), entry, what, validation) for name, entry in document.items() if name != RUNTIME}
    if not models:
        raise ConfigError(f"{what} names no model: give at least one, such as {{'tiny': {{}}}}")
    return ManagerSettings(models, runtime)


def _of_profile(document: Mapping[str, Any], what: str, validation: str) -> ManagerSettings:
    """Return every model of a parsed loading profile; what it says of them is checked where it is used."""
    models = document.get("models")
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(f"{what} is no loading profile: it has no models. Write it with: ladezeit-results verdict")
    settings = {
        str(name): ModelSettings(str(name), str(name), profile=dict(document), validation=validation) for name in models
    }
    return ManagerSettings(settings, None)


def _runtime(values: Any, where: str) -> RuntimeConfig:
    """Return performance settings from plain values; raises `ConfigError` for what there is not."""
    known = [item.name for item in fields(RuntimeConfig)]
    given = dict(_mapping(values, where, known))
    precision = given.get("matmul_precision")
    if precision is not None:
        _check_word(precision, [item.value for item in MatmulPrecision], f"{where}.matmul_precision")
        given["matmul_precision"] = MatmulPrecision(precision)
    threads = given.get("threads")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ConfigError(f"{where}.threads={threads!r} is no number of threads: give 1 or more")
    for name in ("allow_tf32", "cudnn_benchmark"):
        if not isinstance(given.get(name), bool | None):
            raise ConfigError(f"{where}.{name}={given[name]!r} is neither true nor false")
    return RuntimeConfig(**given)


def _model(name: str, entry: Any, what: str, default: str) -> ModelSettings:
    where = f"{what}: {name}"
    given = _mapping(entry, where, _MODEL_KEYS)
    if "model" in given and "path" in given:
        raise ConfigError(f"{where} has both model and path: leave one of them out")
    validation = given.get("validation", default)
    _check_word(validation, [level.value for level in ValidationLevel], f"{where}.validation")
    loading = _mapping(given.get("loading", {}), f"{where}.loading", _LOADING_KEYS)
    source = str(given.get("path") or given.get("model") or name)
    return ModelSettings(
        name, source, validation=str(validation), **_arguments(loading, given.get("device"), f"{where}.loading")
    )


def _arguments(loading: Mapping[str, Any], device: Any, where: str) -> dict[str, Any]:
    """Turn the origin's ``loading`` into arguments of `ladezeit.load`, with each of its rules kept."""
    asked = loading.get("device_map")
    strategy = asked in STRATEGIES or isinstance(asked, dict)
    if loading.get("max_memory") and asked not in STRATEGIES:
        raise ConfigError(
            f"{where}.max_memory was given with device_map={asked}: it means something only where the placement is "
            f"chosen for you. Use device_map=auto, or leave max_memory out"
        )
    if device is not None and asked is not None and not strategy:
        raise ConfigError(f"{where}.device_map={asked} names the device already: leave device={device} out")
    method = loading.get("method")
    if strategy and method is not None:
        raise ConfigError(f"{where}.method={method} loads onto one device, device_map={asked} onto several: drop one")
    allow_offload = not _flag(loading, "disable_cpu_offload", True, where) and strategy
    arguments: dict[str, Any] = {"engine": _FROM_PRETRAINED, "device_map": asked} if strategy else {}
    arguments |= {"disable_cpu_offload": False} if allow_offload else {}
    arguments |= {"dtype": dtype} if (dtype := _dtype(loading, where)) != _AUTO else {}
    if "offload_folder" in loading:
        arguments["offload_folder"] = str(loading["offload_folder"])
    budget = loading.get("max_memory")
    return {
        "device": str(device or "auto") if strategy or asked is None else str(asked),
        "method": method,
        "arguments": arguments,
        "max_memory": {str(key): str(size) for key, size in budget.items()} if budget else None,
        "allow_offload": allow_offload,
    }


def _dtype(loading: Mapping[str, Any], where: str) -> str:
    if "dtype" in loading and "torch_dtype" in loading:
        raise ConfigError(f"{where} has both dtype and torch_dtype, which are one thing: leave torch_dtype out")
    dtype = str(loading.get("dtype", loading.get("torch_dtype", _AUTO))).removeprefix("torch.")
    _check_word(dtype, _DTYPES, f"{where}.dtype")
    return dtype


def _flag(given: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}.{key}={value!r} is neither true nor false")
    return value


def _check_word(value: Any, valid: Iterable[str], where: str) -> None:
    """Raise `ConfigError` where `value` is none of the `valid` words."""
    words = list(valid)
    if value not in words:
        raise ConfigError(f"{where}={value!r} is none of {', '.join(words)}." + did_you_mean(str(value), words))


def _mapping(value: Any, where: str, known: Iterable[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must hold keys and values, found {type(value).__name__}")
    names = list(known)
    for key in map(str, value):
        if key not in names:
            raise ConfigError(
                f"{where} has the key '{key}', which there is not: {', '.join(names)}." + did_you_mean(key, names)
            )
    return value
