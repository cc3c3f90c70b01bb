"""Merges tensors that a model keeps as one, for engines that bring them one by one."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ladezeit.loading.arrangement import Arrangement, Merged
from ladezeit.measure.limits import available_cpus

if TYPE_CHECKING:
    from torch import Tensor


def merge(tensors: "dict[str, Tensor]", arrangement: Arrangement) -> None:
    """Put each merged tensor into `tensors` in place of its parts, on their device and in their dtype.

    Parts are let go as soon as they are merged: where each has memory of its own, two copies exist of one layer alone.
    """
    on_host = all(tensor.device.type == "cpu" for tensor in tensors.values())
    # Copies of small matrices are single-threaded in torch, which lets other threads run meanwhile.
    with ThreadPoolExecutor(available_cpus() if on_host else 1, thread_name_prefix="merge") as pool:
        for merged, tensor in pool.map(lambda one: (one, _merged(one, tensors)), arrangement.merged):
            tensors[merged.name] = tensor


def _merged(merged: Merged, tensors: "dict[str, Tensor]") -> "Tensor":
    import torch

    first = tensors[merged.parts[0].entry.name]
    whole = torch.empty(merged.shape, dtype=first.dtype, device=first.device)
    above = 0
    for column in merged.columns:
        parts = [tensors.pop(name) for name in column]
        height = parts[0].shape[0]
        torch._foreach_copy_(whole[:, above : above + height].unbind(0), parts)
        above += height
    return whole
