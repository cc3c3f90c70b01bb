"""The plain tensors behind a model's tensors, and the memory that they take.

A quantised tensor is not one piece of memory: torchao's are wrappers whose own address is 0, bitsandbytes' carry their
scales beside them. Whoever reads addresses, devices or sizes asks for the parts.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any


def parts(tensor: Any) -> Iterator[Any]:
    """Yield the plain tensors that hold the data of `tensor`: itself where it is one, and its scales and codes."""
    return (part for _, part in named_parts(tensor))


def named_parts(tensor: Any, module: Any = None) -> Iterator[tuple[str, Any]]:
    """Yield what `parts` does, each with its name inside of `tensor`, which is empty for the plain tensor itself.

    A part that is only another view of the tensor itself is left out. `module` is the one that has the parameter:
    bitsandbytes' 8 bit keeps the scales there from the first forward on, and they have the same name in both places.
    """
    tensor = local_part(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of tensors made of tensors
    if flatten is not None:
        for name in flatten()[0]:
            yield from ((_join(name, inner), part) for inner, part in named_parts(getattr(tensor, name)))
        return
    yield "", tensor
    yield from ((name, part) for name, part in _tensors_of(tensor) if not _is_view(part, tensor))
    yield from state_parts(getattr(tensor, "quant_state", None))
    state: Any = vars(module).get("state") if module is not None else None
    if type(state).__module__.startswith("bitsandbytes.") and state.SCB is not None:
        yield "SCB", state.SCB


def state_parts(state: Any, prefix: str = "state") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of bitsandbytes' state of a 4 bit weight by name, and of the one inside it; None has none."""
    while state is not None:  # with double quantisation one is inside another
        yield from ((f"{prefix}.{name}", part) for name, part in _tensors_of(state))
        state, prefix = getattr(state, "state2", None), f"{prefix}.state"


def local_part(tensor: Any) -> Any:
    """Return what this process holds of a tensor: of one that is split over ranks its own part, otherwise itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(model: Any) -> Iterator[Any]:
    """Yield the plain tensors behind all parameters and buffers of `model`; a tied one as often as it is tied."""
    for module in model.modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield from (part for _, part in named_parts(tensor, module if name == "weight" else None))


def reach(tensor: Any) -> int:
    """Return the bytes from a plain tensor's first element to the end of its last, strided or not."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def weights_bytes(model: Any) -> int:
    """Return the bytes of memory that parameters and buffers take on all devices; see `weights_bytes_by_device`."""
    return sum(weights_bytes_by_device(model).values())


def weights_bytes_by_device(model: Any) -> dict[str, int]:
    """Return the bytes of memory that parameters and buffers take on each device (``cpu``, ``cuda:0``), each byte once.

    Tensors that share memory (ties, views) count once, quantised ones with their scales. What is on meta, as offloaded
    weights are between forwards, is not in memory and does not count.
    """
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + reach(tensor))
        for tensor in held(model)
        if not tensor.is_meta and tensor.numel() > 0
    )
    totals: dict[str, int] = {}
    reached = 0
    for device, start, end in spans:
        reached = reached if device in totals else 0
        totals[device] = totals.get(device, 0) + max(0, end - max(start, reached))
        reached = max(end, reached)
    return totals


def _tensors_of(owner: Any) -> Iterator[tuple[str, Any]]:
    from torch import Tensor

    return ((name, value) for name, value in vars(owner).items() if isinstance(value, Tensor) and name != "grad")


def _is_view(part: Any, tensor: Any) -> bool:
    """Say whether `part` is the very memory of `tensor`, as bitsandbytes' 8 bit keeps its codes a second time."""
    same = part.device == tensor.device and part.dtype == tensor.dtype and part.shape == tensor.shape
    return bool(same and not tensor.is_meta and part.data_ptr() == tensor.data_ptr())


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name
