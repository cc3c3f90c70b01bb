"""Every tensor of a model under every name that it has, and where accelerate keeps it if it is not in the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

PARAMETER = "parameter"
BUFFER = "buffer"
#: A buffer that no checkpoint holds: the model's class computes it.
COMPUTED = "computed"


@dataclass(frozen=True)
class Held:
    """One name of a model and the tensor behind it; `kind` is ``parameter``, ``buffer`` or ``computed``.

    An offloaded tensor is on meta, and `fetch` brings what a forward would find; None for any other.
    """

    name: str
    kind: str
    tensor: Any
    fetch: Callable[[], Any] | None = None


def inventory(model: Any) -> list[Held]:
    """Return all names of `model`, tied ones under each of theirs, in the order of its modules."""
    return [held for path, module in model.named_modules() for held in _of_module(path, module)]


def groups(held: list[Held]) -> list[list[Held]]:
    """Return the names that share one tensor's memory, in groups; a name that shares with none is a group of its own.

    Tensors on meta have no memory: they share where they are one object.
    """
    found: dict[tuple[Any, ...], list[Held]] = {}
    for one in held:
        found.setdefault(place(one.tensor), []).append(one)
    return list(found.values())


def place(tensor: Any) -> tuple[Any, ...]:
    """Return what is equal for two tensors that are the same elements of the same memory."""
    if tensor.is_meta or type(tensor).__name__ == "DTensor" or tensor.numel() == 0:
        return ("object", id(tensor))
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))


def _of_module(path: str, module: Any) -> Iterator[Held]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield from _parts(
                f"{path}.{name}" if path else name, PARAMETER, parameter, _elsewhere(module, name, parameter)
            )
    for name, buffer in module._buffers.items():
        if buffer is not None:
            kind = COMPUTED if name in module._non_persistent_buffers_set else BUFFER
            yield from _parts(f"{path}.{name}" if path else name, kind, buffer, _elsewhere(module, name, buffer))


def _parts(name: str, kind: str, tensor: Any, fetch: Callable[[], Any] | None = None) -> Iterator[Held]:
    """Yield a tensor, or what it is made of where it is quantised: codes, scales and code books, by their names."""
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of tensors made of tensors
    if flatten is not None and not hasattr(tensor, "device_mesh"):
        for part in flatten()[0]:
            yield from _parts(f"{name}:{part}", kind, getattr(tensor, part))
        return
    yield Held(name, kind, tensor, fetch)
    owner, prefix = tensor, f"{name}:"
    while owner is not None:  # bitsandbytes keeps scales as attributes, of 4 bit in a state, which may hold another
        for attribute, value in getattr(owner, "__dict__", {}).items():
            if attribute != "grad" and hasattr(value, "data_ptr") and hasattr(value, "untyped_storage"):
                yield Held(f"{prefix}{attribute}", kind, value)
        owner, prefix = getattr(owner, "state2" if owner is not tensor else "quant_state", None), f"{prefix}state."


def _elsewhere(module: Any, name: str, tensor: Any) -> Callable[[], Any] | None:
    """Return how to bring in a tensor that accelerate left on meta in the module, None where nobody keeps its data."""
    if not tensor.is_meta:
        return None
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        kept = getattr(part, "weights_map", None)
        if getattr(part, "offload", False) and kept is not None:
            return partial(kept.__getitem__, name)
    return None
