"""Which values of a config go together: what only the whole shows, checked before anything starts.

What depends on the machine or the model is checked by `ladezeit.loading.preflight`.
"""

import os
from typing import Any

from ladezeit.config.device_map import check_budget, gpu_index, list_places
from ladezeit.config.engines import arguments_class
from ladezeit.config.loading import (
    STRATEGIES,
    AccelerateLoading,
    LegacyManagerLoading,
    LoadingConfig,
    QuantizedLoading,
    TensorLoading,
    TensorParallelLoading,
    TracedLoading,
    TransformersLoading,
)
from ladezeit.config.run import LoadConfig, ProcessKind, RunConfig, ValidationLevel
from ladezeit.errors import CombinationError, ConfigError, did_you_mean

#: Engines that read with one thread, whatever is asked.
_ONE_THREAD = ("safetensors_mmap", "safetensors_pread")

#: Places of a mapping that are no GPU.
_PLACES = ("device", "cpu", "disk")


def check_load(config: LoadConfig) -> None:
    """Check that the values of a load go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    _check_arguments(config.loading)
    check_placement(config.loading, config.device)
    _check_has_effect(config.loading)
    if isinstance(config.loading, TracedLoading):
        _check_traced(config.loading)


def _check_arguments(loading: LoadingConfig) -> None:
    """Refuse an engine that was given another one's arguments; a user's own takes whichever it was written for."""
    if ":" in loading.engine:
        return
    wanted = arguments_class(loading.engine).__dataclass_fields__
    given = type(loading).__dataclass_fields__
    if not wanted.keys() <= given.keys():
        raise CombinationError(
            f"loading.engine={loading.engine} takes {', '.join(wanted)}, and loading={loading.name} has "
            f"{', '.join(given)}. Use an option that starts from /schema/loading/{loading.engine}"
        )


def check_combination(config: RunConfig) -> None:
    """Check that the values of a load, and of how a sample measures it, go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    check_load(config)
    if isinstance(config.loading, TensorParallelLoading):
        _check_ranks(config, config.loading)
    if config.profile and isinstance(config.loading, TensorParallelLoading):
        raise CombinationError(
            f"profile=true was given with loading={config.loading.name}, which is several processes: the profiler sees "
            f"one. Leave it out, or profile the load of one device"
        )


def _check_ranks(config: RunConfig, loading: TensorParallelLoading) -> None:
    asked = f"loading.ranks={loading.ranks} (loading={loading.name})"
    if config.validation.level in (ValidationLevel.logits, ValidationLevel.full):
        raise CombinationError(
            f"{asked} was given with validation={config.validation.level.value}: ranks add up their parts in an order "
            f"of their own, so that logits differ from one process's by more than its noise. Use validation=content, "
            f"which verifies every rank's part bit for bit"
        )
    if config.process.kind is not ProcessKind.fresh:
        raise CombinationError(
            f"{asked} was given with process={config.process.kind.value}: each rank is a new interpreter, because a "
            f"process group cannot be forked or shared. Use process=fresh"
        )
    if config.device.startswith("cuda:") and config.device != "cuda:0":
        raise CombinationError(
            f"{asked} takes the GPUs from cuda:0 on, and device={config.device} was asked for. Use device=cuda, and "
            f"CUDA_VISIBLE_DEVICES to choose among the GPUs"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise CombinationError(f"{asked} starts its ranks itself: run ladezeit alone, without torchrun")


def _check_traced(loading: TracedLoading) -> None:
    module, colon, function = (loading.function or "").partition(":")
    if not (module and colon and function):
        given = "no function was" if loading.function is None else f"loading.function={loading.function} was"
        raise CombinationError(
            f"{given} given with loading={loading.name}: name your own load function, as "
            f"loading.function=module:function or module:Class.method"
        )


def _check_has_effect(loading: LoadingConfig) -> None:
    """Refuse arguments that the engine would take without a word and without effect."""
    if isinstance(loading, TensorLoading) and loading.engine in _ONE_THREAD and loading.threads is not None:
        raise CombinationError(
            f"loading.threads={loading.threads} was given with loading.engine={loading.engine}, which reads with one "
            f"thread. Leave it out, or use an engine with threads"
        )
    if isinstance(loading, QuantizedLoading):
        _check_quantized(loading)
    if isinstance(loading, AccelerateLoading):
        if loading.device_map is None:
            raise CombinationError(
                "loading.device_map=null leaves accelerate's empty model empty. Use device, a strategy or a mapping"
            )
        given = [name for name in ("async_load", "disable_mmap") if getattr(loading, name) is not None]
        if given:
            raise CombinationError(
                f"loading.{given[0]} is an argument of transformers' own loader, which loading.engine=accelerate does "
                f"not use. Leave it out, or use loading=transformers"
            )


def _check_quantized(loading: QuantizedLoading) -> None:
    if loading.device_map is None:
        raise CombinationError(
            f"loading.device_map=null with loading.engine={loading.engine} leaves the device to the library, which "
            f"takes a GPU where it finds one. Use device, a strategy or a mapping"
        )
    if loading.async_load is not None:
        raise CombinationError(
            f"loading.async_load was given with loading.engine={loading.engine}, which reads one tensor after another, "
            f"so that only one is in memory unquantized. Leave it out"
        )
    if not loading.disable_cpu_offload:
        raise CombinationError(
            f"loading.disable_cpu_offload=false was given with loading.engine={loading.engine}: what is offloaded is "
            f"not quantized, or cannot be verified to be. Leave it out, or use loading=device_map_auto"
        )


def check_placement(loading: LoadingConfig, device: str) -> None:
    """Check a placement by itself and against `device` (as asked for, or as found).

    Raises:
        ConfigError: a word in it means nothing.
        CombinationError: its parts do not go together.
    """
    if not isinstance(loading, TransformersLoading) or isinstance(loading, LegacyManagerLoading):
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
