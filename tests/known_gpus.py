"""A driver (NVML) that answers for the GPUs of a test as the real one does, error numbers included."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

GIB = 2**30


@dataclass(frozen=True)
class Known:
    """A GPU, or an instance of one: `error` is the number that NVML gives for its handle, 0 for a sound one.

    `mig` are the instances of one in MIG mode, None where it is not in it.
    """

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total_bytes: int = 80 * GIB
    error: int = 0
    mig: tuple["Known", ...] | None = None
    memory_error: int = 0


@dataclass
class Driver:
    """The machine's GPUs in the order of their PCI addresses."""

    gpus: list[Known] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have pynvml answer for these GPUs."""
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.95.05",
            "nvmlDeviceGetCount": lambda: len(self.gpus),  # those that cannot be opened too, as the real one says
            "nvmlDeviceGetHandleByIndex": lambda number: self._opened(self.gpus[number]),
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetUUID": lambda handle: handle.uuid,
            "nvmlDeviceGetName": lambda handle: handle.name,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
            "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetMigMode": lambda handle: [int(handle.mig is not None)] * 2,
            "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._instance,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)

    def _opened(self, gpu: Known) -> Known:
        if gpu.error:
            raise pynvml.NVMLError(gpu.error)
        return gpu

    def _by_uuid(self, uuid: str) -> Known:
        every = [one for gpu in self.gpus for one in (gpu, *(gpu.mig or ()))]
        found = [one for one in every if one.uuid == uuid]
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self._opened(found[0])

    def _instance(self, handle: Known, number: int) -> Known:
        if handle.mig is None or number >= len(handle.mig):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return handle.mig[number]

    def _memory(self, handle: Known, version: Any = None) -> Any:
        if handle.memory_error:
            raise pynvml.NVMLError(handle.memory_error)
        return SimpleNamespace(total=handle.total_bytes, used=GIB, free=handle.total_bytes - GIB)


def open_cuda(monkeypatch: pytest.MonkeyPatch, gpus: list[Known]) -> None:
    """Have torch say that it has opened CUDA, which numbers `gpus` in this order."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _properties(gpus[_number(device)]))


def _number(device: Any) -> int:
    return device if isinstance(device, int) else int(str(device).partition(":")[2] or 0)


def _properties(gpu: Known) -> Any:
    return SimpleNamespace(uuid=gpu.uuid.partition("-")[2], name=gpu.name, total_memory=gpu.total_bytes)
