"""Which values of a config go together: what only the whole shows, checked before anything starts."""

import os

from ladezeit.config import (
    AccelerateLoading,
    LoadingConfig,
    ProcessKind,
    QuantisedLoading,
    RunConfig,
    TensorLoading,
    TensorParallelLoading,
    TracedLoading,
    ValidationLevel,
)
from ladezeit.errors import CombinationError
from ladezeit.placement_rules import check_placement

#: Engines that read with one thread, whatever is asked.
_ONE_THREAD = ("safetensors_mmap", "safetensors_pread")


def check_combination(config: RunConfig) -> None:
    """Check that the values go together.

    Raises:
        CombinationError: with what was asked and what to do.
    """
    check_placement(config.loading, config.device)
    _check_has_effect(config.loading)
    if isinstance(config.loading, TracedLoading):
        _check_traced(config.loading)
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
            f"which proves every bit of every rank's part"
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
