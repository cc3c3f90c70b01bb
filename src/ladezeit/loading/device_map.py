"""A placement on a concrete machine and model: budgets in bytes, and whether a mapping names the model's modules."""

from collections.abc import Mapping
from typing import Any

from ladezeit.config import TransformersLoading
from ladezeit.config.device_map import UNITS, budget_key, is_strategy, size_and_unit
from ladezeit.errors import ConfigError, did_you_mean
from ladezeit.loading.base import LoadRequest
from ladezeit.model.classes import build_on_meta, class_and_config

_MOST_NAMED = 5


def max_memory(loading: TransformersLoading, device: str) -> dict[int | str, int] | None:
    """Return the `max_memory` argument in bytes, keyed as accelerate keys devices; None where none was asked.

    A strategy takes every GPU it finds, so a run on the CPU of a machine with GPUs gets a budget of host memory alone.
    """
    if not loading.max_memory:
        return {"cpu": _total_bytes("cpu")} if device == "cpu" and is_strategy(loading) and _has_gpu() else None
    budget: dict[int | str, int] = {}
    for key, size in loading.max_memory.items():
        place = budget_key(device if key == "device" else key)
        budget[place] = _bytes(size, place)
    return budget


def name_places(resolved: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return a model's `hf_device_map` with torch's names of the devices, where the library has GPUs by number."""
    if resolved is None:
        return None
    return {module: f"cuda:{place}" if isinstance(place, int) else str(place) for module, place in resolved.items()}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _bytes(size: str, place: int | str) -> int:
    number, unit = size_and_unit(size, str(place))
    return int(_total_bytes(place) * number / 100 if unit == "%" else number * UNITS[unit])


def _total_bytes(place: int | str) -> int:
    if place == "cpu":
        from ladezeit.system.limits import memory_limit_bytes

        return memory_limit_bytes()
    import torch

    return int(torch.cuda.mem_get_info(place)[1])


# Whether a mapping from module to device names modules that there are, and leaves none out.


def refuse_unknown_modules(model: Any, loading: TransformersLoading) -> None:
    """Raise `ConfigError` where the mapping names what is neither a module nor a parameter of `model`."""
    if not isinstance(loading.device_map, dict):
        return
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in loading.device_map:
        if name not in known:
            near = sorted((other for other in known if other.count(".") <= name.count(".")), key=len)
            raise ConfigError(
                f"loading.device_map names '{name}', and {type(model).__name__} has no such module."
                + (did_you_mean(name, near) or f" There are {', '.join(filter(None, near[:_MOST_NAMED]))} and others")
            )


def refuse_uncovered(model: Any, loading: TransformersLoading) -> None:
    """Raise `ConfigError` where the mapping gives some parameter no place."""
    if not isinstance(loading.device_map, dict):
        return
    left_out = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not any(key in ("", name) or name.startswith(f"{key}.") for key in loading.device_map)
    ]
    if left_out:
        named = ", ".join(left_out[:_MOST_NAMED]) + (" …" if len(left_out) > _MOST_NAMED else "")
        raise ConfigError(
            f"loading.device_map gives no place to {len(left_out)} parameters ({named}): name the modules they are "
            f"in, or use a strategy such as loading.device_map=auto"
        )


def explain_map(loading: TransformersLoading, request: LoadRequest, cause: Exception) -> None:
    """Raise `ConfigError` from `cause` where the mapping is what a library refused; it is held against a meta model."""
    if not isinstance(loading.device_map, dict):
        return
    model = build_on_meta(*class_and_config(request.checkpoint.folder, request.trust_remote_code))
    try:
        refuse_unknown_modules(model, loading)
        refuse_uncovered(model, loading)
    except ConfigError as refusal:
        raise refusal from cause
