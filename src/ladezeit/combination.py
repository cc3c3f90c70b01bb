"""Which values of a config go together: what only the whole shows, checked before anything starts."""

from ladezeit.config import (
    STRATEGIES,
    AccelerateLoading,
    LegacyManagerLoading,
    LoadingConfig,
    QuantisedLoading,
    RunConfig,
    TensorLoading,
    TransformersLoading,
)
from ladezeit.errors import CombinationError, ConfigError, did_you_mean

#: Engines that read with one thread, whatever is asked.
_ONE_THREAD = ("safetensors_mmap", "safetensors_pread")


def check_combination(config: RunConfig) -> None:
    """Check that the values go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    if isinstance(config.loading, TransformersLoading) and not isinstance(config.loading, LegacyManagerLoading):
        _check_placement(config.loading, config.device)
    _check_has_effect(config.loading)


def _check_has_effect(loading: LoadingConfig) -> None:
    """Refuse arguments that the engine would take without a word and without effect."""
    if isinstance(loading, TensorLoading) and loading.engine in _ONE_THREAD and loading.threads is not None:
        raise CombinationError(
            f"loading.threads={loading.threads} was given with loading.engine={loading.engine}, which reads with one "
            f"thread. Leave it out, or use an engine with threads"
        )
    if isinstance(loading, QuantisedLoading):
        _check_quantised(loading)
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


def _check_quantised(loading: QuantisedLoading) -> None:
    if loading.device_map is None:
        raise CombinationError(
            f"loading.device_map=null with loading.engine={loading.engine} leaves the device to the library, which "
            f"takes a GPU where it finds one. Use device, a strategy or a mapping"
        )
    if loading.async_load is not None:
        raise CombinationError(
            f"loading.async_load was given with loading.engine={loading.engine}, which reads one tensor after another, "
            f"so that only one is in memory unquantised. Leave it out"
        )
    if not loading.disable_cpu_offload:
        raise CombinationError(
            f"loading.disable_cpu_offload=false was given with loading.engine={loading.engine}: what is offloaded is "
            f"not quantised, or not provably so. Leave it out, or use loading=device_map_auto"
        )


def _check_placement(loading: TransformersLoading, device: str) -> None:
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
    if isinstance(asked, str) and asked not in (*STRATEGIES, "device", "cpu") and not asked.startswith("cuda"):
        raise ConfigError(
            f"loading.device_map={asked} is neither a strategy, a device nor a mapping."
            + did_you_mean(asked, (*STRATEGIES, "device", "cpu", "cuda"))
        )
    if loading.disable_cpu_offload:
        _refuse_offload(loading, device)


def _refuse_offload(loading: TransformersLoading, device: str) -> None:
    places = loading.device_map.values() if isinstance(loading.device_map, dict) else [loading.device_map]
    offloaded = {str(place) for place in places} & ({"disk"} if device == "cpu" else {"cpu", "disk"})
    if device == "auto":
        offloaded -= {"cpu"}  # known only when the device is: the plan looks again
    if device != "cpu" and "cpu" in loading.max_memory and device != "auto":
        offloaded.add("cpu")
    if offloaded or loading.offload_folder is not None:
        where = " and ".join(sorted(offloaded)) or f"the folder {loading.offload_folder}"
        raise CombinationError(
            f"loading.disable_cpu_offload is set, yet the placement names {where}. Set "
            f"loading.disable_cpu_offload=false if that offload is wanted, or take {where} out of the placement"
        )
