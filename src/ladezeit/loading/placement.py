"""Turns the words of a loading method (`device`, `90%`) into what `from_pretrained` takes."""

from typing import Any

from ladezeit.config import STRATEGIES, LoadingConfig, TransformersLoading
from ladezeit.errors import ConfigError

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def device_map(loading: TransformersLoading, device: str) -> Any:
    """Return the `device_map` argument with the word ``device`` replaced by the run's device."""
    asked = loading.device_map
    if isinstance(asked, dict):
        return {module: device if place == "device" else place for module, place in asked.items()}
    return device if asked == "device" else asked


def max_memory(loading: TransformersLoading, device: str) -> dict[int | str, int] | None:
    """Return the `max_memory` argument in bytes, keyed as accelerate keys devices; None where none was asked."""
    if not loading.max_memory:
        return None
    budget: dict[int | str, int] = {}
    for key, size in loading.max_memory.items():
        place = _place(device if key == "device" else key)
        budget[place] = _bytes(size, place)
    return budget


def single_device(loading: LoadingConfig) -> bool:
    """Return whether the placement is one explicit device, so that nothing is left to a strategy."""
    if not isinstance(loading, TransformersLoading):
        return True
    asked = loading.device_map
    if isinstance(asked, dict):
        return len(set(asked.values())) == 1
    return asked is None or not is_strategy(loading)


def is_strategy(loading: LoadingConfig) -> bool:
    """Return whether the placement is left to accelerate."""
    return isinstance(loading, TransformersLoading) and loading.device_map in STRATEGIES


def _place(device: str) -> int | str:
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0)
    if device.isdigit():
        return int(device)
    if device == "cpu":
        return "cpu"
    raise ConfigError(f"loading.max_memory names '{device}': its keys are device, cpu or the number of a GPU")


def _bytes(size: str, place: int | str) -> int:
    text = size.strip().upper()
    try:
        if text.endswith("%"):
            return int(_total_bytes(place) * float(text[:-1]) / 100)
        for unit in sorted(_UNITS, key=len, reverse=True):
            if text.endswith(unit):
                return int(float(text[: -len(unit)]) * _UNITS[unit])
        return int(text)
    except ValueError:
        raise ConfigError(
            f"loading.max_memory has the size '{size}' for {place}: write a share such as 90%, or a size such as 20GiB"
        ) from None


def _total_bytes(place: int | str) -> int:
    if place == "cpu":
        from ladezeit.measure.limits import memory_limit_bytes

        return memory_limit_bytes()
    import torch

    return int(torch.cuda.mem_get_info(place)[1])
