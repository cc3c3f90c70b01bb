"""Reads option files of ``conf/`` (and of a user's config folder) as Hydra composes them, without Hydra.

An option may start from a schema (``/schema/model/hub@_here_``) and from other options of its own group; what else a
defaults list can say has no meaning for one option alone and is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ladezeit.config.run import FolderModel, LoadConfig, RunConfig
from ladezeit.config.schema import schemas_of
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.redaction import holds_credentials, redact_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Schema = TypeVar("_Schema", bound="DataclassInstance")
_SCHEMA = re.compile(r"/schema/(?P<group>\w+)/(?P<name>\w+)@_here_")


def list_options(group: str, config_dir: Path | None = None) -> list[str]:
    """Return the names of all options of `group`, a user's own included."""
    return sorted({path.stem for folder in _folders(group, config_dir) for path in folder.glob("*.yaml")})


def read_option(group: str, name: str, config_dir: Path | None = None) -> Any:
    """Return the object that the option composes to; a user's option comes before ours of the same name.

    Args:
        group: such as ``loading``.
        name: of the option, without ``.yaml``.
        config_dir: a folder with a folder for each group, as Hydra's ``--config-dir`` takes it.

    Raises:
        ConfigError: there is no such option, it cannot be read, or it says what its schema does not know.
    """
    node = _ours(group, name) if config_dir is None else _composed(group, name, config_dir, ())
    return as_object(node, f"{group}={name}")


def from_mapping(schema: type[_Schema], values: Any, label: str) -> _Schema:
    """Return an object of `schema` with `values` (plain data) in it; `label` opens the errors.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or one is missing.
    """
    known = [item.name for item in fields(schema)]
    for key in map(str, values):
        if key not in known:
            raise ConfigError(
                f"{label} has the key '{key}', which {schema.__name__} does not know: there are {', '.join(known)}."
                + did_you_mean(key, known)
            )
    try:
        node = OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException as cause:
        raise ConfigError(f"{label}: {_first_line(cause)}") from cause
    return as_object(node, label)  # type: ignore[no-any-return]


def as_object(node: Any, label: str) -> Any:
    """Return the object that a node of a schema stands for; raises `ConfigError` where a value is missing."""
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as cause:
        raise ConfigError(f"{label}: {_first_line(cause)}") from cause


@cache
def _ours(group: str, name: str) -> Any:
    """Compose one of our own options once a process: reading it takes longer than all else before a small load."""
    return _composed(group, name, None, ())


def _composed(group: str, name: str, config_dir: Path | None, above: Sequence[str]) -> Any:
    if name in above:
        raise ConfigError(f"{group}={name} starts from itself ({' > '.join([*above, name])}): change its defaults")
    own = _read(group, name, config_dir)
    defaults = own.pop("defaults", [])
    told = f"{group}={name}"
    parts = [_default(entry, group, config_dir, (*above, name), own) for entry in defaults]
    if "_self_" not in defaults:
        parts.append(own)
    try:
        return OmegaConf.merge(*parts)
    except OmegaConfBaseException as cause:
        raise ConfigError(f"{told}: {_first_line(cause)}") from cause


def _default(entry: Any, group: str, config_dir: Path | None, above: Sequence[str], own: DictConfig) -> Any:
    if entry == "_self_":
        return own
    schema = _SCHEMA.fullmatch(str(entry))
    schemas = {} if schema is None else schemas_of(schema["group"])
    if schema is not None and schema["name"] in schemas:
        return OmegaConf.structured(schemas[schema["name"]])
    if isinstance(entry, str) and schema is None and "/" not in entry and "@" not in entry:
        return _composed(group, entry, config_dir, above)
    raise ConfigError(
        f"{group}={above[-1]} has '{entry}' in its defaults: there may be a schema (/schema/{group}/…@_here_), other "
        f"options of {group}, and _self_"
    )


def _read(group: str, name: str, config_dir: Path | None) -> DictConfig:
    path = next((f / f"{name}.yaml" for f in _folders(group, config_dir) if (f / f"{name}.yaml").is_file()), None)
    if path is None or Path(name).name != name:
        known = list_options(group, config_dir)
        raise ConfigError(f"{group}={name} is not an option: there are {', '.join(known)}." + did_you_mean(name, known))
    try:
        found = OmegaConf.load(path)
    except (OSError, ValueError, OmegaConfBaseException) as cause:
        raise ConfigError(f"{path} cannot be read: {cause}") from cause
    except Exception as cause:  # the YAML library's own errors have no common base with these
        raise ConfigError(f"{path} is not YAML: {_first_line(cause)}") from cause
    if not isinstance(found, DictConfig):
        raise ConfigError(f"{path} is not an option file: it must hold keys and values")
    return found


def _folders(group: str, config_dir: Path | None) -> list[Path]:
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(f"config_dir={config_dir} is no folder: give the one that holds folders such as {group}/")
    ours = Path(str(files("ladezeit.conf")))
    return [folder / group for folder in ([config_dir, ours] if config_dir is not None else [ours])]


def _first_line(cause: Exception) -> str:
    return str(cause).strip().split("\n")[0]


# Composed config becomes objects here, and nowhere else; each value is checked on the way.


def build_config(composed: DictConfig) -> RunConfig:
    """Turn a composed config into objects and check each value; `rules.check_combination` looks at them together.

    Raises:
        ConfigError: a key is unknown, or a value is out of its range.
        omegaconf.errors.OmegaConfBaseException: a mandatory value is missing or an interpolation fails.
    """
    _check_keys(composed, "")
    refuse_credentials(OmegaConf.to_container(composed, resolve=True))
    config = OmegaConf.to_object(composed)
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "the composed config is not a ladezeit run: its first default must be '/schema/run' (see conf/config.yaml)"
        )
    for key in fields(config):
        if getattr(config, key.name) == MISSING:  # deleted with ~key
            raise ConfigError(f"{key.name} has no value and needs one: give it as {key.name}=VALUE")
    check_values(config)
    if isinstance(config.model, FolderModel) and config.model.name == "folder":  # the option's name, not the model's
        config.model.name = Path(config.model.path).expanduser().absolute().name or config.model.name
    return config


def check_load_values(config: LoadConfig) -> None:
    """Check each value of a load by itself; raises `ConfigError`."""
    check_device(config.device)
    _check_least(
        {
            "validation.k": (config.validation.k, 1),
            "runtime.threads": (config.runtime.threads, 1),
            **{
                f"loading.{item.name}": (getattr(config.loading, item.name), item.metadata["least"])
                for item in fields(config.loading)
                if "least" in item.metadata
            },
        }
    )


def check_values(config: RunConfig) -> None:
    """Check each value of `config` by itself; raises `ConfigError`."""
    check_load_values(config)
    _check_least(
        {
            "sample": (config.sample, 0),
            "inference.new_tokens": (config.inference.new_tokens, 0),
            "process.time_limit_s": (config.process.time_limit_s, 1),
        }
    )


def _check_keys(node: DictConfig, path: str) -> None:
    """Refuse keys that were added with ``+`` where no schema knows them: they would change nothing."""
    kind = OmegaConf.get_type(node)
    if not is_dataclass(kind):
        return
    known = [item.name for item in fields(kind)]
    for key in map(str, node):
        if key not in known:
            raise ConfigError(
                f"'{path}{key}' is no key of the config: there are {', '.join(known)}." + did_you_mean(key, known)
            )
        if (
            not OmegaConf.is_missing(node, key)
            and not OmegaConf.is_interpolation(node, key)
            and OmegaConf.is_dict(node[key])
        ):
            _check_keys(node[key], f"{path}{key}.")


def check_device(device: str) -> None:
    """Check how a device is written: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; raises `ConfigError`."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdigit() or (not index and device == "cuda")):
        return
    if device in ("auto", "cpu"):
        return
    raise ConfigError(
        f"device={device} is not a device: use auto, cpu, cuda or cuda:N."
        + did_you_mean(device, ("auto", "cpu", "cuda", "cuda:0"))
    )


def refuse_credentials(node: Any, key: str = "") -> None:
    """Refuse plain data in which an address holds a user, a password or a token; `key` is where `node` stands.

    Raises:
        ConfigError: there is one; the text does not repeat it.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            refuse_credentials(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            refuse_credentials(value, key)
    elif isinstance(node, str) and holds_credentials(node):
        raise ConfigError(
            f"{redact_text(key)} holds an address with a user, a password or a token, and configs are written into "
            f"results and logs: leave it out; the address of a tracking store can be MLFLOW_TRACKING_URI in the "
            f"environment instead"
        )


def _check_least(limits: dict[str, tuple[float | None, float]]) -> None:
    """Refuse values below the least of their key; None is no value."""
    for key, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(f"{key}={value} is too small: the least is {least}")
