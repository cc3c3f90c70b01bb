"""From the arguments of `ladezeit.load` to one checked config: which model, by which method, held to what.

The method is, in this order: what `loading` says, what the profile says for this model and device, `auto`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import (
    DType,
    FolderModel,
    HubModel,
    LoadConfig,
    LoadingConfig,
    ModelConfig,
    RuntimeConfig,
    TransformersLoading,
    ValidationConfig,
    ValidationLevel,
    check_load_values,
)
from ladezeit.config.compose import from_mapping, list_options, read_option
from ladezeit.config.device_map import is_strategy
from ladezeit.config.engines import arguments_class
from ladezeit.config.loading_profile import Profile
from ladezeit.config.rules import check_load
from ladezeit.errors import CombinationError, ConfigError, NotRunnableError, did_you_mean
from ladezeit.system.gpus import ResolvedDevice

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
#: The option that only says how a folder is named on a command line.
_FOLDER_OPTION = "folder"


@dataclass(frozen=True)
class LoadArguments:
    """The arguments of `ladezeit.load` that say what is loaded and how; see there."""

    model: str | os.PathLike[str] | ModelConfig
    loading: str | Mapping[str, Any] | LoadingConfig | None = None
    profile: str | os.PathLike[str] | Mapping[str, Any] | None = None
    validation: str = "placement"
    max_memory: Mapping[Any, Any] | None = None
    allow_offload: bool = False
    config_dir: Path | None = None


@dataclass(frozen=True)
class ChosenLoad:
    """A checked config, who chose its method (``loading``, ``profile`` or ``auto``), and for a profile the fingerprint
    of the checkpoint that it was measured for, where it says so.
    """

    config: LoadConfig
    chosen_by: str
    measured_for: str | None = None

    def check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raise `ConfigError` where the profile's method was measured for another checkpoint."""
        if self.measured_for not in (None, checkpoint.fingerprint):
            raise ConfigError(
                f"the profile's method for '{self.config.model.name}' was measured for another checkpoint (fingerprint "
                f"{self.measured_for}) than the one in {checkpoint.folder} ({checkpoint.fingerprint}): measure this "
                f"one (ladezeit -m model=folder model.path=… loading=…), or name the method with loading="
            )


def config_of(requested: LoadArguments, device: ResolvedDevice) -> ChosenLoad:
    """Return how a model is loaded, checked.

    Raises:
        ConfigError: a name or a value means nothing, with the nearest that does.
        CombinationError: values that do not go together.
        NotRunnableError: the method cannot run inside of one process.
    """
    model = model_of(requested.model, requested.config_dir)
    chosen_by, runtime, measured_for = "auto", RuntimeConfig(), None
    if requested.loading is not None:
        chosen_by, loading = "loading", loading_of(requested.loading, requested.config_dir)
    elif requested.profile is not None:
        chosen_by = "profile"
        method = Profile.open(requested.profile).method_for(model, device.name, requested.config_dir)
        loading, runtime, measured_for = method.loading, method.runtime, method.fingerprint
    else:
        loading = arguments_class("auto")(name="auto")
    config = LoadConfig(
        model=model,
        loading=_permitted(loading, requested),
        validation=ValidationConfig(level_of(requested.validation)),
        runtime=runtime,
        device=device.name,
    )
    check_load_values(config)
    check_load(config)
    return ChosenLoad(config, chosen_by, measured_for)


def model_of(requested: str | os.PathLike[str] | ModelConfig, config_dir: Path | None = None) -> ModelConfig:
    """Return the model that is meant: a configured name, a folder, or a hub id (``org/name`` or ``org/name@revision``).

    A configured name comes first, then a folder that is there; raises `ConfigError` where it is none of the three.
    """
    if isinstance(requested, ModelConfig):
        return requested
    if not isinstance(requested, str | os.PathLike) or not os.fspath(requested):
        raise ConfigError(
            f"model={requested!r} names no model: give a configured name, a folder, a hub id (org/name@revision), or "
            f"a ModelConfig"
        )
    text = os.fspath(requested)
    known = [name for name in list_options("model", config_dir) if name != _FOLDER_OPTION]
    if isinstance(requested, str) and requested in known:
        model = read_option("model", requested, config_dir)
        assert isinstance(model, ModelConfig)
        return model
    if not isinstance(requested, str) or Path(text).expanduser().is_dir() or text.startswith(("/", ".", "~")):
        folder = Path(text).expanduser().absolute()
        return FolderModel(name=folder.name or str(folder), path=str(folder))
    hub = _HUB_ID.fullmatch(text)
    if hub is not None:
        return HubModel(name=hub["repo"].rpartition("/")[2], repo_id=hub["repo"], revision=hub["revision"] or "main")
    raise ConfigError(
        f"model '{text}' is neither configured ({', '.join(known)}), nor a folder that is there, nor a hub id "
        f"(org/name or org/name@revision)." + did_you_mean(text, known)
    )


def loading_of(requested: str | Mapping[str, Any] | LoadingConfig, config_dir: Path | None = None) -> LoadingConfig:
    """Return the method that is meant: an option of group ``loading``, or its arguments (``engine`` is `auto` if left
    out); raises `ConfigError`.
    """
    if isinstance(requested, LoadingConfig):
        return requested
    if isinstance(requested, str):
        found = read_option("loading", requested, config_dir)
        assert isinstance(found, LoadingConfig)
        return found
    values = dict(requested)
    engine = str(values.setdefault("engine", "auto"))
    values.setdefault("name", engine)
    return from_mapping(arguments_class(engine), values, f"loading (engine={engine})")


def level_of(requested: str) -> ValidationLevel:
    """Return the level by its name; raises `ConfigError`."""
    if requested not in ValidationLevel.__members__:
        levels = list(ValidationLevel.__members__)
        raise ConfigError(
            f"validation={requested} is no level: there are {', '.join(levels)}." + did_you_mean(str(requested), levels)
        )
    return ValidationLevel[requested]


def dtype_of(requested: str) -> DType:
    """Return the dtype by its name, with or without ``torch.``; raises `ConfigError`."""
    name = str(requested).removeprefix("torch.")
    if name not in DType.__members__:
        raise ConfigError(
            f"dtype={requested} is none of {', '.join(DType.__members__)}." + did_you_mean(name, DType.__members__)
        )
    return DType[name]


def _permitted(loading: LoadingConfig, requested: LoadArguments) -> LoadingConfig:
    """Return the method with what the caller permits and limits; nothing is offloaded that was not allowed."""
    if loading.process_count > 1:
        raise NotRunnableError(
            f"loading={loading.name} is several processes, each with its part of the model, and load() is one: start "
            f"the ranks yourself, or take a method on one process such as loading='device_map_auto'"
        )
    if not loading.disable_cpu_offload and not requested.allow_offload:
        raise CombinationError(
            f"loading={loading.name} lets weights be offloaded, which makes every answer slow, and that was not "
            f"allowed: pass allow_offload=True if it is wanted, or take another method"
        )
    loading = replace(loading, disable_cpu_offload=not requested.allow_offload)
    if requested.max_memory is None:
        return loading
    if not isinstance(loading, TransformersLoading) or not is_strategy(loading):
        raise CombinationError(
            f"max_memory was given with loading={loading.name}, which places the model itself: it means something only "
            f"where the placement is left to a strategy. Use loading='device_map_auto', or leave max_memory out"
        )
    return replace(loading, max_memory={str(place): str(size) for place, size in requested.max_memory.items()})
