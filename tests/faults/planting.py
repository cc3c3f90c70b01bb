"""Engines that load with a real engine and then plant one fault: ``planting:<fault>_under_<engine>``.

`Planting` stands where an engine stands, so what proves the load cannot tell it from any other.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from file_faults import GATE, UP
from torch.nn import Parameter

from ladezeit.loading.base import EngineModel, LoadRequest
from ladezeit.loading.registry import make_engine
from ladezeit.timing.clock import Clock
from ladezeit.validation.faults import Fault

NORM = "model.layers.1.input_layernorm.weight"
FREQUENCIES = "model.rotary_emb.inv_freq"
SCALE = "model.norm.scale"
HEAD = "lm_head.weight"
_UNDER = "_under_"


class Planting:
    """Loads with the engine `under`, then plants `fault` in what it made."""

    def __init__(self, fault: Fault, under: str) -> None:
        self._fault = fault
        self._engine = make_engine(under)

    def prepare(self, request: LoadRequest) -> None:
        """See `Engine.prepare`."""
        self._engine.prepare(request)

    def load(self, request: LoadRequest, clock: Clock) -> EngineModel:
        """See `Engine.load`."""
        loaded = self._engine.load(request, clock)
        IN_MEMORY[self._fault][0](loaded, request)
        return loaded


def __getattr__(name: str) -> Callable[[], Planting]:
    """Make the engines of this module by their names."""
    fault, found, under = name.partition(_UNDER)
    if not found:
        raise AttributeError(name)
    return partial(Planting, Fault(fault), under)


def planting(fault: Fault, under: str) -> str:
    """Return the name of the engine that plants `fault` under another, for ``loading.engine``."""
    return f"planting:{fault}{_UNDER}{under}"


def weight(loaded: EngineModel, name: str) -> Any:
    """Return a weight whose memory is its own and may be written."""
    held = loaded.model.get_parameter(name)
    held.data = held.data.clone()
    return held


def flipped_bit(loaded: EngineModel, request: LoadRequest) -> None:
    weight(loaded, UP).data.view(torch.int16).view(-1)[1234] ^= 1


def swapped_words(loaded: EngineModel, request: LoadRequest) -> None:
    words = weight(loaded, UP).data.view(-1)
    words[[3, 900]] = words[[900, 3]]


def swapped_tensors(loaded: EngineModel, request: LoadRequest) -> None:
    one, other = weight(loaded, UP), weight(loaded, GATE)
    one.data, other.data = other.data, one.data


def planted_nan(loaded: EngineModel, request: LoadRequest) -> None:
    weight(loaded, UP).data[5, 5] = float("nan")


def missing_tensor(loaded: EngineModel, request: LoadRequest) -> None:
    loaded.model.model.layers[1].mlp.up_proj.weight = None


def extra_tensor(loaded: EngineModel, request: LoadRequest) -> None:
    norm = loaded.model.model.norm
    norm.register_buffer("scale", torch.ones(3, dtype=norm.weight.dtype, device=norm.weight.device))


def wrong_shape(loaded: EngineModel, request: LoadRequest) -> None:
    held = weight(loaded, NORM)
    held.data = held.data.view(1, -1)  # a forward broadcasts it and says nothing


def wrong_dtype(loaded: EngineModel, request: LoadRequest) -> None:
    held = weight(loaded, NORM)
    held.data = held.data.to(torch.float32)


def buffer_on_meta(loaded: EngineModel, request: LoadRequest) -> None:
    rotary = loaded.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to("meta")


def weight_on_meta(loaded: EngineModel, request: LoadRequest) -> None:
    projection = loaded.model.model.layers[1].mlp.up_proj
    projection.weight = Parameter(projection.weight.detach().to("meta"), requires_grad=False)


def untied_head(loaded: EngineModel, request: LoadRequest) -> None:
    head = loaded.model.lm_head
    head.weight = Parameter(head.weight.detach().clone(), requires_grad=False)


def silent_offload(loaded: EngineModel, request: LoadRequest) -> None:
    """On a CPU to the disk; on a GPU to host memory, as `device_map` strategies do."""
    from accelerate import cpu_offload, disk_offload

    device = torch.device(request.device)
    layer = loaded.model.model.layers[1]
    if device.type == "cpu":
        disk_offload(layer, str(request.scratch / "away"), execution_device=device)
    else:
        cpu_offload(layer, execution_device=device)


def overwritten_buffer(loaded: EngineModel, request: LoadRequest) -> None:
    """The engine's ring: the weight is read into it, handed on as it lies there, and the next read comes over it."""
    ring = weight(loaded, UP).data
    ring.view(torch.uint8).fill_(0x11)


def freed_buffer(loaded: EngineModel, request: LoadRequest) -> None:
    """The weight stays in a block of host memory that was given back to the allocator, whose bytes are still right."""
    held = loaded.model.get_parameter(UP)
    size = held.numel() * held.element_size()
    block = torch.empty(size, dtype=torch.uint8)
    loaded.model.behind_it = torch.empty(size, dtype=torch.uint8)  # keeps the block inside of the heap
    address = block.data_ptr()
    block.copy_(held.data.cpu().view(torch.uint8).view(-1))
    del block
    freed = np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=np.uint8)
    dangling = torch.from_numpy(freed).view(held.dtype).view(held.shape)
    loaded.model.model.layers[1].mlp.up_proj.weight = Parameter(dangling, requires_grad=False)
    loaded.lent_bytes = [size]


_Plants = Callable[[EngineModel, LoadRequest], None]

#: Every fault in memory, and the names of which a finding must say at least one.
IN_MEMORY: dict[Fault, tuple[_Plants, tuple[str, ...]]] = {
    Fault.flipped_bit: (flipped_bit, (UP,)),
    Fault.swapped_words: (swapped_words, (UP,)),
    Fault.swapped_tensors: (swapped_tensors, (UP, GATE)),
    Fault.planted_nan: (planted_nan, (UP,)),
    Fault.missing_tensor: (missing_tensor, (UP,)),
    Fault.extra_tensor: (extra_tensor, (SCALE,)),
    Fault.wrong_shape: (wrong_shape, (NORM,)),
    Fault.wrong_dtype: (wrong_dtype, (NORM,)),
    Fault.buffer_on_meta: (buffer_on_meta, (FREQUENCIES,)),
    Fault.weight_on_meta: (weight_on_meta, (UP,)),
    Fault.untied_head: (untied_head, (HEAD,)),
    Fault.silent_offload: (silent_offload, (UP, "model.layers.1")),
    Fault.overwritten_buffer: (overwritten_buffer, (UP,)),
    Fault.freed_buffer: (freed_buffer, (UP,)),
}
