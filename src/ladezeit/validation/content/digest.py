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
from ladezeit.validation.content.device_kernel import device_kernel
from ladezeit.validation.content.device_sums import DeviceSums
from ladezeit.validation.content.fused_sums import FusedSums
from ladezeit.validation.content.host_sums import HostSums
from ladezeit.validation.content.native_sums import native_kernel
from ladezeit.validation.content.pieces import flat_pieces, size_bytes
from ladezeit.validation.content.sums import ROW_BYTES

if TYPE_CHECKING:
    import torch
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
    import torch

    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{name} has no plain bytes: {tensor.device}, {tensor.layout}, {tensor.dtype}")
        by_device.setdefault(tensor.device, {})[name] = tensor
    found: dict[str, str] = {}
    threads = min(available_cpus(), _MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for device, own in by_device.items():
            found.update(_on_host(own, pool) if device.type == "cpu" else _on_device(own, pool, threads))
    return {name: found[name] for name in tensors}


def digest(tensor: "Tensor") -> str:
    """Return the digest (32 hex digits) of one tensor; see `digests`."""
    return digests({"": tensor})[""]


def summed_by(device: "torch.device") -> str:
    """Return in words what adds up on a device: a compiled kernel, or what gives the same sums in more time."""
    if device.type == "cpu":
        return "a compiled kernel" if native_kernel() is not None else "numpy (nothing was compiled at installation)"
    return "a compiled kernel" if device_kernel(device) is not None else "torch's operations (no kernel was right here)"


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


def _on_device(tensors: "Mapping[str, Tensor]", pool: ThreadPoolExecutor, threads: int) -> dict[str, str]:
    import torch

    kernel = device_kernel(next(iter(tensors.values())).device)
    fused, others, small = [], [], []
    for name, tensor in tensors.items():
        if size_bytes(tensor) <= ROW_BYTES:
            small.append(name)
        elif kernel is not None and _is_plain(tensor):
            fused.append(name)
        else:
            others.append(name)
    under_way: list[tuple[list[str], FusedSums | DeviceSums]] = []
    if kernel is not None and fused:
        under_way.append((fused, FusedSums(kernel, [tensors[name] for name in fused])))
    if others:
        under_way.append((others, DeviceSums([tensors[name] for name in others])))
    found: dict[str, str] = {}
    if small:  # brought to the host as one tensor: a copy each would wait for the device each time
        parts = [piece for name in small for piece in flat_pieces(tensors[name])]
        data = torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=np.uint8)
        start = 0
        for name in small:
            end = start + size_bytes(tensors[name])
            found[name] = _seal(tensors[name], data[start:end])
            start = end
    for names, sums in under_way:
        made = list(zip(names, sums.results(), strict=True))
        step = -(-len(made) // threads)  # a task each would take longer to hand out than to do
        shares = [made[first : first + step] for first in range(0, len(made), step)]
        for sealed in pool.map(lambda share: {name: _seal(tensors[name], *parts) for name, parts in share}, shares):
            found.update(sealed)
    return found


def _is_plain(tensor: "Tensor") -> bool:
    """Say whether a tensor's elements lie in order in one piece of memory, as they are."""
    import torch

    own = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # others may wrap any number of tensors
    return own and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _raw(tensor: "Tensor") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    pieces = [piece.numpy() for piece in flat_pieces(tensor)]
    return pieces[0] if pieces else np.empty(0, dtype=np.uint8)


def _seal(tensor: "Tensor", *parts: "np.ndarray[Any, Any]") -> str:
    sealed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)};".encode(), digest_size=_DIGEST_BYTES)
    for part in parts:
        sealed.update(np.ascontiguousarray(part).view(np.uint8).data)
    return sealed.hexdigest()
