"""Every tensor of a model under every name that it has, and where accelerate keeps it if it is not in the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ladezeit.model.tensors import named_component_tensors, shard_spec_of

PARAMETER = "parameter"
BUFFER = "buffer"
#: A buffer that no checkpoint holds: the model's class computes it.
COMPUTED = "computed"
#: A part of a weight that a quantizer made of one in the checkpoint.
QUANTIZED = "quantised"


@dataclass(frozen=True)
class NamedTensor:
    """One name of a model and the tensor behind it; `kind` is ``parameter``, ``buffer``, ``computed`` or
    ``quantised``.

    An offloaded tensor is on meta, and `fetch` brings what a forward would find; None for any other. Of a tensor that
    is split over ranks `tensor` is this rank's part, and `shard_spec` says how it was split (see `model.tensors`).
    """

    name: str
    kind: str
    tensor: Any
    fetch: Callable[[], Any] | None = None
    shard_spec: str | None = None


def list_tensors(model: Any) -> list[NamedTensor]:
    """Return all names of `model`, tied ones under each of theirs, in the order of its modules."""
    return [held for path, module in model.named_modules() for held in _of_module(path, module)]


def group_tied(held: list[NamedTensor]) -> list[list[NamedTensor]]:
    """Return the names that share one tensor's memory, in groups; a name that shares with none is a group of its own.

    Tensors on meta have no memory: they share where they are one object.
    """
    found: dict[tuple[Any, ...], list[NamedTensor]] = {}
    for one in held:
        found.setdefault(storage_key(one.tensor), []).append(one)
    return list(found.values())


def storage_key(tensor: Any) -> tuple[Any, ...]:
    """Return what is equal for two tensors that are the same elements of the same memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return ("object", id(tensor))
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), str(tensor.dtype))


def _of_module(path: str, module: Any) -> Iterator[NamedTensor]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield from _held(_join(path, name), PARAMETER, parameter, module, name)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            kind = COMPUTED if name in module._non_persistent_buffers_set else BUFFER
            yield from _held(_join(path, name), kind, buffer, module, name)


def _held(full: str, kind: str, tensor: Any, module: Any, name: str) -> Iterator[NamedTensor]:
    """Yield a tensor, or what it is made of where it is quantized: codes, scales and code books, by their names."""
    way = shard_spec_of(tensor)
    for part, plain in named_component_tensors(tensor, module if name == "weight" else None):
        fetch = None if part else _elsewhere(module, name, tensor)
        yield NamedTensor(part_name(full, part), kind, plain, fetch, way)


def part_name(full: str, part: str) -> str:
    """Return the name of a part of the tensor `full`, as `model.tensors.named_parts` calls it inside of that."""
    return f"{full}:{part}" if part else full


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


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
