"""The words of a placement (`device`, `cuda:1`, `90%`), read without knowing machine or model."""

import hashlib
from pathlib import Path
from typing import Any

from ladezeit.config.loading import STRATEGIES, TransformersLoading
from ladezeit.config.run import LoadingConfig
from ladezeit.errors import ConfigError

UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def device_map(loading: TransformersLoading, device: str) -> Any:
    """Return the `device_map` argument with the word ``device`` replaced by the run's device, and GPUs as numbers."""
    asked = loading.device_map
    if isinstance(asked, dict):
        return {module: _argument(place, device) for module, place in asked.items()}
    return _argument(asked, device)


def _argument(place: Any, device: str) -> Any:
    if place == "device":
        return device
    return int(place) if isinstance(place, str) and place.isdigit() else place


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


def list_places(loading: TransformersLoading) -> list[str]:
    """Return the places that the config names, as it names them: of the device map, or of the budget for a strategy."""
    if is_strategy(loading):
        return list(map(str, loading.max_memory))
    asked = loading.device_map
    return [str(place) for place in (asked.values() if isinstance(asked, dict) else [asked]) if place is not None]


def gpu_index(place: str) -> int | None:
    """Return the N of a place ``cuda:N``, ``cuda`` or ``N``; None for other places."""
    kind, _, index = place.partition(":")
    if kind == "cuda" and (index.isdigit() or place == "cuda"):
        return int(index or 0)
    return int(place) if place.isdigit() else None


def check_budget(loading: TransformersLoading) -> None:
    """Check how `max_memory` is written; raises `ConfigError`."""
    for key, size in loading.max_memory.items():
        if key != "device":
            budget_key(key)
        size_and_unit(str(size), key)


def offload_folder(loading: TransformersLoading, scratch: Path) -> Path:
    """Return the folder that this sample alone offloads to: in its scratch folder, or in the one that was asked for.

    Whoever runs the sample removes it afterwards, and nothing else of what lies beside it.
    """
    if loading.offload_folder is None:
        return scratch / "offload"
    return Path(loading.offload_folder) / f"ladezeit-{hashlib.sha256(str(scratch).encode()).hexdigest()[:12]}"


def may_offload_to_disk(loading: TransformersLoading) -> bool:
    """Return whether the placement can come to name the disk, asked or not."""
    return is_strategy(loading) or "disk" in list_places(loading)


def budget_key(key: str) -> int | str:
    """Return a key of `max_memory` as accelerate keys devices; raises `ConfigError` where it is none."""
    index = gpu_index(key)
    if index is not None:
        return index
    if key == "cpu":
        return "cpu"
    raise ConfigError(f"loading.max_memory names '{key}': its keys are device, cpu or the number of a GPU")


def size_and_unit(size: str, place: str) -> tuple[float, str]:
    """Return the number and the unit (one of `UNITS`, or ``%``) of a size in `max_memory`; raises `ConfigError`."""
    found = parse_size(size)
    if found is None:
        raise ConfigError(
            f"loading.max_memory has the size '{size}' for {place}: write a share such as 90%, or a size such as 20GiB"
        )
    return found


def parse_size(text: str) -> tuple[float, str] | None:
    """Return the number and the unit of ``20GiB``, ``512`` (one of `UNITS`) or ``90%``; None where it is none."""
    text = text.strip().upper()
    unit = next((unit for unit in ("%", *sorted(UNITS, key=len, reverse=True)) if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        return None
    if not 0 <= number < float("inf"):
        return None
    return number, unit or "B"
