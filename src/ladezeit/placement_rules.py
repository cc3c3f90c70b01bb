"""What a placement may say: alone, together with the rest of the config, and on the machine that is there.

`check_placement` needs the config alone. `check_on_machine` is asked again when the device is known, and looks at the
GPUs that a placement over several devices names; `devices_used` says which of them a sample holds.
"""

from typing import Any

from ladezeit.config import STRATEGIES, LegacyManagerLoading, LoadingConfig, TensorParallelLoading, TransformersLoading
from ladezeit.errors import CombinationError, ConfigError, NotRunnableError, did_you_mean
from ladezeit.loading import placement
from ladezeit.measure.devices import ResolvedDevice, check_numbers, cuda_devices

#: Places of a mapping that are no GPU.
_PLACES = ("device", "cpu", "disk")


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


def check_on_machine(loading: LoadingConfig, device: ResolvedDevice) -> None:
    """Check the placement once more, now that the device is known, and that the GPUs it names are there.

    Raises:
        CombinationError: see `check_placement`.
        NotRunnableError: the machine has no such GPU, or too few of them.
    """
    check_placement(loading, device.name)
    needed = _gpus_named(loading, device)
    if not needed:
        return
    if not isinstance(loading, TensorParallelLoading):  # which asks for a count, whichever GPUs these are
        check_numbers(needed, f"the placement of {loading.name} names GPUs by number")
    gpus = cuda_devices()
    if max(needed) >= len(gpus):
        found = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus) or "no GPU"
        asked = (
            f"loading.ranks={loading.ranks}"
            if isinstance(loading, TensorParallelLoading)
            else f"the placement of {loading.name}"
        )
        raise NotRunnableError(
            f"{asked} needs {' and '.join(f'cuda:{index}' for index in sorted(needed))}, found {found}. "
            f"Use a machine that has them, or a placement on fewer devices"
        )


def check_on_model(loading: LoadingConfig, model: dict[str, Any]) -> None:
    """Check that the ranks can share the model's heads; `model` is the checkpoint's config.json.

    Raises:
        CombinationError: they cannot be split evenly.
    """
    if not isinstance(loading, TensorParallelLoading):
        return
    counts = {
        key: model[key] for key in ("num_attention_heads", "num_key_value_heads") if isinstance(model.get(key), int)
    }
    uneven = [f"{key}={count}" for key, count in counts.items() if count % loading.ranks]
    if uneven:
        raise CombinationError(
            f"loading.ranks={loading.ranks} does not divide the model's {' and '.join(uneven)}: each rank holds whole "
            f"heads. Use a number of ranks that divides them"
        )


def devices_used(loading: LoadingConfig, device: ResolvedDevice) -> list[ResolvedDevice]:
    """Return all devices that a sample may be on, the run's own first: each is locked, and waited for, alone."""
    if device.gpu is None:
        return [device]
    budgeted = isinstance(loading, TransformersLoading) and bool(loading.max_memory)
    every = placement.is_strategy(loading) and not budgeted
    named = _gpus_named(loading, device)
    if not every and named <= {device.gpu.index}:
        return [device]
    others = [gpu for gpu in cuda_devices() if gpu.uuid != device.gpu.uuid and (every or gpu.index in named)]
    return [device, *(ResolvedDevice(f"cuda:{gpu.index}", gpu, None) for gpu in others)]


def _gpus_named(loading: LoadingConfig, device: ResolvedDevice) -> set[int]:
    if isinstance(loading, TensorParallelLoading):
        return set(range(loading.ranks)) if device.gpu is not None else set()
    if not isinstance(loading, TransformersLoading):
        return set()
    indices = map(placement.gpu_index, placement.places(loading))
    return {index for index in indices if index is not None}


def _check_words(loading: TransformersLoading) -> None:
    placement.check_budget(loading)
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
    return placement.gpu_index(str(place)) is not None


def _check_on_cpu(loading: TransformersLoading) -> None:
    named = placement.places(loading)
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
    named = set(placement.places(loading))
    offloaded = named & ({"disk"} if device == "cpu" else {"cpu", "disk"})
    if device == "auto":
        offloaded -= {"cpu"}  # known only when the device is: then it is looked at again
    if offloaded or loading.offload_folder is not None:
        where = " and ".join(sorted(offloaded)) or f"the folder {loading.offload_folder}"
        raise CombinationError(
            f"loading.disable_cpu_offload is set, yet the placement names {where}. Set "
            f"loading.disable_cpu_offload=false if that offload is wanted, or take {where} out of the placement"
        )
