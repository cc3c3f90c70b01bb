"""The plain tensors behind a model's tensors, and the memory that they take.

A quantised tensor is not one piece of memory: torchao's are wrappers whose own address is 0, bitsandbytes' carry their
scales beside them. Whoever reads addresses, devices or sizes asks for the parts.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any


def parts(tensor: Any) -> Iterator[Any]:
    """Yield the plain tensors that hold the data of `tensor`: itself where it is one, and its scales and codes."""
    tensor = local_part(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of tensors made of tensors
    if flatten is not None:
        for name in flatten()[0]:
            yield from parts(getattr(tensor, name))
        return
    yield tensor
    yield from _tensors_of(tensor)
    state = getattr(tensor, "quant_state", None)  # bitsandbytes' 4 bit; with double quantisation one inside another
    while state is not None:
        yield from _tensors_of(state)
        state = getattr(state, "state2", None)


def local_part(tensor: Any) -> Any:
    """Return what this process holds of a tensor: of one that is split over ranks its own part, otherwise itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def held(model: Any) -> Iterator[Any]:
    """Yield the plain tensors behind all parameters and buffers of `model`; a tied one as often as it is tied."""
    for module in model.modules():
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                yield from parts(tensor)
        # bitsandbytes' 8 bit keeps the scales here from the first forward on, beside what the last input left.
        state = vars(module).get("state")
        if type(state).__module__.startswith("bitsandbytes.") and state.SCB is not None:
            yield state.SCB


def reach(tensor: Any) -> int:
    """Return the bytes from a plain tensor's first element to the end of its last, strided or not."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def weights_bytes(model: Any) -> int:
    """Return the bytes of memory that parameters and buffers take on all devices, each byte once.

    Tensors that share memory (ties, views) count once, quantised ones with their scales. What is on meta, as offloaded
    weights are between forwards, is not in memory and does not count.
    """
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + reach(tensor))
        for tensor in held(model)
        if not tensor.is_meta and tensor.numel() > 0
    )
    total = reached = 0
    place = ""
    for device, start, end in spans:
        reached = reached if device == place else 0
        place = device
        total += max(0, end - max(start, reached))
        reached = max(end, reached)
    return total


def _tensors_of(owner: Any) -> Iterator[Any]:
    from torch import Tensor

    return (value for value in vars(owner).values() if isinstance(value, Tensor))
