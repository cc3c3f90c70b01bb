"""The engines that there are, and what is to be known of each without running it.

A file of `ladezeit.loading.engines` names its engines in a tuple ``ENGINES``. They are looked up by the package's name
when the first one is asked for, and not imported here: what composes a config or writes a report needs an engine's
facts (the schema of its arguments, flags of other servers), and must not come to need what it loads with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ladezeit.config.loading import TransformersLoading
from ladezeit.config.run import LoadingConfig
from ladezeit.errors import ConfigError, did_you_mean

_PACKAGE = "ladezeit.loading.engines"


@dataclass(frozen=True)
class ServerFlags:
    """The flags with which vLLM 0.20 and SGLang 0.5 load as an engine does, None where a server has none; and a note.

    See https://docs.vllm.ai/en/latest/models/extensions/ (`vllm/config/load.py`) and
    https://docs.sglang.io/docs/advanced_features/model_loading.
    """

    vllm: tuple[str, ...] | None
    sglang: tuple[str, ...] | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """An engine as config and reports know it; `ladezeit.loading.base.EngineSpec` adds how it is made.

    `arguments` is the schema of its option files. `packages` are the modules it imports besides torch, transformers and
    safetensors; `devices` and `formats` what it can serve. `releases` are requirements of package versions
    (``safetensors>=0.9``), `device_file` a path that a driver makes, without which the engine would do something else;
    `cuda_library` what it asks the system's loader for on a GPU. `converter`, as ``module:Class``, writes checkpoints
    in the format that the engine reads (see `ladezeit.loading.conversion`). `servers` are other servers' flags, which
    may depend on its arguments (plain data, as a loading profile has them).
    """

    name: str
    arguments: type[LoadingConfig]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    formats: tuple[str, ...] = ("safetensors",)
    releases: tuple[str, ...] = ()
    device_file: str | None = None
    cuda_library: str | None = None
    converter: str | None = None
    servers: ServerFlags | Callable[[Mapping[str, Any]], ServerFlags] | None = None


@cache
def find_engines() -> dict[str, EngineFacts]:
    """Return all engines by name; imports their files, once a process: milliseconds, and no torch."""
    folders = import_module(_PACKAGE).__path__
    files = [import_module(f"{_PACKAGE}.{found.name}") for found in iter_modules(folders)]
    return {facts.name: facts for file in files for facts in file.ENGINES}


def engine_facts(name: str, label: str = "") -> EngineFacts | None:
    """Return the facts about the engine `name`; None for a user's own, as ``module:Class``.

    Raises:
        ConfigError: there is no such engine; `label` opens the message.
    """
    if ":" in name:
        return None
    known = find_engines()
    if name not in known:
        raise ConfigError(
            f"{label}loading.engine={name} is not an engine: there are {', '.join(known)}, and your own as "
            f"module:Class." + did_you_mean(name, known)
        )
    return known[name]


def arguments_class(engine: str, label: str = "") -> type[LoadingConfig]:
    """Return the schema of an engine's arguments: that of `transformers` for a user's own; see `engine_facts`."""
    facts = engine_facts(engine, label)
    return TransformersLoading if facts is None else facts.arguments
