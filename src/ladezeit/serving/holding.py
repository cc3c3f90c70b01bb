"""Whether a model's memory is really given back: watched at the storages themselves, whoever holds them."""

import ctypes
import gc
import sys
from typing import Any

from ladezeit.serving.budget import Bytes


class Holding:
    """The storages behind a model's tensors, watched without being held."""

    def __init__(self, model: Any) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        from ladezeit.loading.parts import held

        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage()
            for tensor in held(model)
            if not tensor.is_meta and tensor.numel() > 0
        }
        self._storages: list[Any] = [StorageWeakRef(storage) for storage in storages.values()]  # type: ignore[no-untyped-call]

    def is_gone(self) -> bool:
        """Say whether the last tensor that shares memory with the model is gone."""
        self._storages = [storage for storage in self._storages if not storage.expired()]
        return not self._storages

    def is_gone_after_collection(self) -> bool:
        """As `is_gone`, after the garbage collector took what only cycles hold; it runs only where it is needed."""
        if self.is_gone():
            return True
        gc.collect()
        return self.is_gone()


def taken_bytes() -> Bytes:
    """Return the memory that this process has from the machine: resident pages, and what torch reserved on GPUs."""
    import psutil

    torch = sys.modules.get("torch")
    gpu = 0
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        gpu = sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
    return Bytes(gpu=gpu, host=psutil.Process().memory_info().rss)


def give_back() -> None:
    """Have the allocators return to the machine what they keep for later: torch's on the GPUs, the C library's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none to call
    if trim is not None:
        trim(0)
