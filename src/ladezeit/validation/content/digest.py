"""The digest of a tensor: equal digests mean equal dtype, shape and bytes; the same on every device.

`sums` says what is summed and what that finds for certain. A strong hash over dtype, shape and all sums makes 128 bits
of it, so that neither a truncated nor a reinterpreted tensor passes. A tensor of one row (8 KiB) or less
is hashed as it is.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ladezeit.measure.limits import available_cpus
from ladezeit.validation.content.device_sums import DeviceSums
from ladezeit.validation.content.host_sums import HostSums
from ladezeit.validation.content.pieces import flat_pieces, size_bytes
from ladezeit.validation.content.sums import ROW_BYTES

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST_BYTES = 16
_MOST_THREADS = 16
#: Tensors on their way at once: their row sums wait for the hash, a thousandth of their size.
_IN_FLIGHT = 256


def digests(tensors: "Mapping[str, Tensor]") -> dict[str, str]:
    """Return the digest (32 hex digits) of each tensor by its name; every tensor is read, where it lies.

    Strided tensors count as their elements in order. Tensors may lie on several devices; none may be on meta.

    Raises:
        ValueError: a tensor has no bytes to read: it is on meta, sparse or of a quantised torch dtype.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout.__str__() != "torch.strided" or tensor.is_quantized:
            raise ValueError(f"{name} has no plain bytes: {tensor.device}, {tensor.layout}, {tensor.dtype}")
    by_device: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(str(tensor.device), []).append(name)
    found: dict[str, str] = {}
    with ThreadPoolExecutor(min(available_cpus(), _MOST_THREADS)) as pool:
        for device, names in by_device.items():
            own = {name: tensors[name] for name in names}
            found.update(_on_host(own, pool) if device == "cpu" else _on_device(own, pool))
    return {name: found[name] for name in tensors}


def digest(tensor: "Tensor") -> str:
    """Return the digest (32 hex digits) of one tensor; see `digests`."""
    return digests({"": tensor})[""]


def _on_host(tensors: "Mapping[str, Tensor]", pool: ThreadPoolExecutor) -> dict[str, str]:
    found: dict[str, str] = {}
    large = [name for name, tensor in tensors.items() if size_bytes(tensor) > ROW_BYTES]
    for first in range(0, len(large), _IN_FLIGHT):
        under_way = [(name, HostSums(tensors[name], pool)) for name in large[first : first + _IN_FLIGHT]]
        for name, sums in under_way:
            found[name] = _seal(tensors[name], *sums.result())
    for name in tensors.keys() - found.keys():
        found[name] = _seal(tensors[name], _raw(tensors[name]))
    return found


def _on_device(tensors: "Mapping[str, Tensor]", pool: ThreadPoolExecutor) -> dict[str, str]:
    import torch

    large = [name for name, tensor in tensors.items() if size_bytes(tensor) > ROW_BYTES]
    small = [name for name in tensors if name not in set(large)]
    found: dict[str, str] = {}
    sums = DeviceSums([tensors[name] for name in large]) if large else None
    if small:  # brought to the host as one tensor: a copy each would wait for the device each time
        parts = [piece for name in small for piece in flat_pieces(tensors[name])]
        data = torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=np.uint8)
        start = 0
        for name in small:
            end = start + size_bytes(tensors[name])
            found[name] = _seal(tensors[name], data[start:end])
            start = end
    if sums is not None:
        sealed = pool.map(lambda one: _seal(tensors[one[0]], *one[1]), zip(large, sums.results(), strict=True))
        found.update(zip(large, sealed, strict=True))
    return found


def _raw(tensor: "Tensor") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    pieces = [piece.numpy() for piece in flat_pieces(tensor)]
    return pieces[0] if pieces else np.empty(0, dtype=np.uint8)


def _seal(tensor: "Tensor", *parts: "np.ndarray[Any, Any]") -> str:
    sealed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)};".encode(), digest_size=_DIGEST_BYTES)
    for part in parts:
        sealed.update(np.ascontiguousarray(part).view(np.uint8).data)
    return sealed.hexdigest()
