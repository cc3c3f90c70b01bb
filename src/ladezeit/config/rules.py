"""Which values of a config go together: what only the whole shows, checked before anything starts.

What depends on the machine or the model is checked by `ladezeit.loading.preflight`.
"""

from typing import Any

from ladezeit.config.device_map import check_budget, gpu_index, list_places
from ladezeit.config.engines import engine_facts
from ladezeit.config.loading import STRATEGIES, TransformersLoading
from ladezeit.config.run import LoadConfig, LoadingConfig, RunConfig
from ladezeit.errors import CombinationError, ConfigError, did_you_mean

#: Places of a mapping that are no GPU.
_PLACES = ("device", "cpu", "disk")


def check_load(config: LoadConfig) -> None:
    """Check that the values of a load go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    _check_schema(config.loading)
    check_placement(config.loading, config.device)
    config.loading.check_arguments()


def _check_schema(loading: LoadingConfig) -> None:
    """Refuse an engine that was given another one's arguments; a user's own takes whichever it was written for."""
    facts = engine_facts(loading.engine)
    if facts is not None and not isinstance(loading, facts.arguments):
        own = ", ".join(facts.arguments.__dataclass_fields__)
        raise CombinationError(
            f"loading.engine={loading.engine} takes its own arguments ({own}), and "
            f"loading={loading.name} has another engine's. Use an option that starts from "
            f"/schema/loading/{loading.engine}"
        )


def check_combination(config: RunConfig) -> None:
    """Check that the values of a load, and of how a sample measures it, go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    check_load(config)
    config.loading.check_run(config)


def check_placement(loading: LoadingConfig, device: str) -> None:
    """Check a placement by itself and against `device` (as asked for, or as found).

    Raises:
        ConfigError: a word in it means nothing.
        CombinationError: its parts do not go together.
    """
    if not isinstance(loading, TransformersLoading) or not loading.checks_placement:
        return
    _check_words(loading)
    asked = loading.device_map
    if loading.max_memory and asked not in STRATEGIES:
        raise CombinationError(
            f"loading.max_memory was given with device_map={asked}: it means something only where the placement is "
            f"chosen for you. Use loading.device_map=auto, or leave max_memory out"
        )
    if loading.move_to_device and asked is not None:
        raise CombinationError(
            f"loading.move_to_device moves a model that was loaded without a device_map, but device_map={asked} "
            f"places it already. Leave one of the two out"
        )
    if device == "cpu":
        _check_on_cpu(loading)
    if loading.disable_cpu_offload:
        _refuse_offload(loading, device)


def _check_words(loading: TransformersLoading) -> None:
    check_budget(loading)
    asked = loading.device_map
    if isinstance(asked, dict):
        _check_mapping(asked)
    elif asked is not None and asked not in (*STRATEGIES, "device", "cpu") and not _is_gpu(asked):
        raise ConfigError(
            f"loading.device_map={asked} is neither a strategy, a device nor a mapping."
            + did_you_mean(str(asked), (*STRATEGIES, "device", "cpu", "cuda"))
        )


def _check_mapping(mapping: dict[Any, Any]) -> None:
    if not mapping:
        raise ConfigError("loading.device_map is an empty mapping: name modules and their devices, or use device")
    for module, place in mapping.items():
        if str(place) not in _PLACES and not _is_gpu(place):
            raise ConfigError(
                f"loading.device_map places '{module}' on '{place}': use device, cpu, disk, cuda:N or the number of "
                f"a GPU." + did_you_mean(str(place), (*_PLACES, "cuda:0"))
            )
    if "" in mapping and len(mapping) > 1:
        # accelerate attaches its hooks for '' first and then cannot take a module elsewhere.
        raise ConfigError(
            "loading.device_map names the whole model ('') and modules of it: name every module instead, such as "
            "model.embed_tokens, model.layers, model.norm and lm_head"
        )


def _is_gpu(place: Any) -> bool:
    return gpu_index(str(place)) is not None


def _check_on_cpu(loading: TransformersLoading) -> None:
    named = list_places(loading)
    gpus = [place for place in named if _is_gpu(place)]
    if gpus:
        raise CombinationError(
            f"the placement of {loading.name} names {', '.join(dict.fromkeys(gpus))}, and the run is on the CPU. "
            f"Use device=auto or device=cuda on a machine that has it, or take it out of the placement"
        )
    if {"device", "cpu"} <= set(named):
        raise CombinationError(
            f"the placement of {loading.name} names device and cpu, which are one and the same on a CPU run: nothing "
            f"would be offloaded. Use a machine with a GPU, or leave one of the two out"
        )


def _refuse_offload(loading: TransformersLoading, device: str) -> None:
    named = set(list_places(loading))
    offloaded = named & ({"disk"} if device == "cpu" else {"cpu", "disk"})
    if device == "auto":
        offloaded -= {"cpu"}  # known only when the device is: then it is looked at again
    if offloaded or loading.offload_folder is not None:
        where = " and ".join(sorted(offloaded)) or f"the folder {loading.offload_folder}"
        raise CombinationError(
            f"loading.disable_cpu_offload is set, yet the placement names {where}. Set "
            f"loading.disable_cpu_offload=false if that offload is wanted, or take {where} out of the placement"
        )
