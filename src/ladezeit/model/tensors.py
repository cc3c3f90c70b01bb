"""The plain tensors behind a model's tensors: the memory that they take, how they are split over ranks, their pages.

A quantized tensor is not one piece of memory: torchao's are wrappers whose own address is 0, bitsandbytes' carry their
scales beside them. Whoever reads addresses, devices or sizes asks for the parts.
"""

import ctypes
import errno
import mmap
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from ladezeit.system.libc import MADV_POPULATE_READ, advise_memory

if TYPE_CHECKING:
    from torch import Tensor


#: Stands for a way that has no word here: nothing is verified of such a part.
UNKNOWN = "unknown"

_PAGE = mmap.PAGESIZE


def component_tensors(tensor: Any) -> Iterator[Any]:
    """Yield the plain tensors that hold the data of `tensor`: itself where it is one, and its scales and codes."""
    return (part for _, part in named_component_tensors(tensor))


def named_component_tensors(tensor: Any, module: Any = None) -> Iterator[tuple[str, Any]]:
    """Yield what `component_tensors` does, each with its name inside of `tensor`, which is empty for the plain tensor
    itself.

    A part that is only another view of the tensor itself is left out. `module` is the one that has the parameter:
    bitsandbytes' 8 bit keeps the scales there from the first forward on, and they have the same name in both places.
    """
    tensor = local_part(tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)  # torch's protocol of tensors made of tensors
    if flatten is not None:
        for name in flatten()[0]:
            yield from ((_join(name, inner), part) for inner, part in named_component_tensors(getattr(tensor, name)))
        return
    yield "", tensor
    yield from ((name, part) for name, part in _tensors_of(tensor) if not _is_view(part, tensor))
    yield from state_component_tensors(getattr(tensor, "quant_state", None))
    state: Any = vars(module).get("state") if module is not None else None
    if type(state).__module__.startswith("bitsandbytes.") and state.SCB is not None:
        yield "SCB", state.SCB


def state_component_tensors(state: Any, prefix: str = "state") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of bitsandbytes' state of a 4 bit weight by name, and of the one inside it; None has none."""
    while state is not None:  # with double quantization one is inside another
        yield from ((f"{prefix}.{name}", part) for name, part in _tensors_of(state))
        state, prefix = getattr(state, "state2", None), f"{prefix}.state"


def local_part(tensor: Any) -> Any:
    """Return what this process holds of a tensor: of one that is split over ranks its own part, otherwise itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def iter_storage_tensors(model: Any) -> Iterator[Any]:
    """Yield the plain tensors behind all parameters and buffers of `model`; a tied one as often as it is tied."""
    for module in model.modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield from (part for _, part in named_component_tensors(tensor, module if name == "weight" else None))


def meta_tensors(model: Any) -> list[str]:
    """Return the names of the tensors on meta, found the origin manager's way: each once for every module above it."""
    found = {
        f"{path}.{name}" if path else name: None
        for path, module in model.named_modules()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_meta
    }
    return list(found)


def byte_span(tensor: Any) -> int:
    """Return the bytes from a plain tensor's first element to the end of its last, strided or not."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def weights_bytes(model: Any) -> int:
    """Return the bytes of memory that parameters and buffers take on all devices; see `weights_bytes_by_device`."""
    return sum(weights_bytes_by_device(model).values())


def weights_bytes_by_device(model: Any) -> dict[str, int]:
    """Return the bytes of memory that parameters and buffers take on each device (``cpu``, ``cuda:0``), each byte once.

    Tensors that share memory (ties, views) count once, quantized ones with their scales. What is on meta, as offloaded
    weights are between forwards, is not in memory and does not count.
    """
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + byte_span(tensor))
        for tensor in iter_storage_tensors(model)
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
    """Say whether `shard_of` is the very memory of `tensor`, as bitsandbytes' 8 bit keeps its codes a second time."""
    same = part.device == tensor.device and part.dtype == tensor.dtype and part.shape == tensor.shape
    return bool(same and not tensor.is_meta and part.data_ptr() == tensor.data_ptr())


def _join(name: str, inner: str) -> str:
    return f"{name}.{inner}" if inner else name


# How a weight is split over ranks: in which dimension, in how many groups, and which part is whose.


def shard_spec_of(tensor: Any) -> str | None:
    """Return how the DTensor `tensor` is split over the ranks of its one group; None where every rank holds all of it.

    See torch's ``torch.distributed.tensor.placement_types``.
    """
    if not hasattr(tensor, "device_mesh"):
        return None
    if len(tensor.placements) != 1:
        return UNKNOWN
    (placement,) = tensor.placements
    if placement.is_replicate():
        return None
    if not hasattr(placement, "dim") or placement.is_partial():
        return UNKNOWN
    return shard_spec(placement.dim % tensor.dim(), getattr(placement, "split_factor", 1))


def shard_specs(model: Any) -> dict[str, str]:
    """Return how each parameter of `model` that is split is split, by name; tied ones under each of theirs."""
    found = {name: shard_spec_of(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: one for name, one in found.items() if one is not None}


def shard_spec(dimension: int, groups: int) -> str:
    """Return the word for a way."""
    return f"{dimension}/{groups}" if groups > 1 else str(dimension)


def shard_of(whole: "Tensor", way: str, rank: int, ranks: int) -> "Tensor":
    """Return what `rank` of `ranks` holds of `whole`; the last parts are smaller, or empty, where it does not divide.

    Shape: that of `whole`, shorter in the way's dimension. All ranks' parts together are `whole`, each element once.
    """
    import torch

    dimension, _, groups = way.partition("/")
    runs = whole.chunk(int(groups or 1), int(dimension))
    mine = [_run_part(run, int(dimension), rank, ranks) for run in runs]
    return mine[0] if len(mine) == 1 else torch.cat(mine, int(dimension))


def _run_part(run: "Tensor", dimension: int, rank: int, ranks: int) -> "Tensor":
    length = run.shape[dimension]
    size = -(-length // ranks)
    begin = min(rank * size, length)
    return run.narrow(dimension, begin, min(size, length - begin))


# Touches what a load left lazy: a load that only mapped a file is not done.


def fault_in_pages(model: Any) -> int:
    """Fault in every page of the model's tensors in host memory; return the bytes that were touched.

    Raises:
        OSError: a page could not be read (an I/O error of the file behind it).
    """
    total = 0
    for start, length in _extents(model):
        if not _populate(start, length):
            _read_each_page(start, length)
        total += length
    return total


def _extents(model: Any) -> list[tuple[int, int]]:
    """Return (address, bytes) of the host memory behind the model, merged where tensors lie on neighboring pages."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + byte_span(tensor))
        for tensor in iter_storage_tensors(model)
        if tensor.device.type == "cpu" and tensor.numel() > 0
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start // _PAGE <= -(-merged[-1][1] // _PAGE):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return [(start, end - start) for start, end in merged]


def _populate(start: int, length: int) -> bool:
    first = start - start % _PAGE
    size = -(-(start + length - first) // _PAGE) * _PAGE
    number = advise_memory(first, size, MADV_POPULATE_READ)
    if number == 0:
        return True
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOMEM):
        return False  # an old kernel, or a gap between merged tensors
    raise OSError(number, "the weights could not be read from their file")


def _read_each_page(start: int, length: int) -> None:
    view = (ctypes.c_char * length).from_address(start)
    for offset in range(0, length, _PAGE):
        view[offset]
