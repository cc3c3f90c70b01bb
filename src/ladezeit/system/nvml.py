"""GPUs as the driver tells of them (NVML): each with what it is, how full it is, and how it is divided.

The driver's numbers are those of the PCI addresses' order. Nothing here knows of CUDA's; see `devices`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU (or MIG instance) as a sample's process sees it.

    `index` is the N of ``cuda:N``: it counts within ``CUDA_VISIBLE_DEVICES``. `total_bytes` is 0 and the link's
    generation and width are None where the driver does not tell. The link is what it can be, not what it is while idle.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    driver: str
    pcie_generation: int | None
    pcie_width: int | None


@dataclass(frozen=True)
class Card:
    """A GPU as the driver lists it, and its MIG instances: None where it is not divided into such."""

    gpu: Gpu
    instances: tuple[Gpu, ...] | None


@contextmanager
def open_nvml() -> Iterator[None]:
    """Have the driver answer for the block; raises `pynvml.NVMLError` where there is none."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def list_cards() -> list[Card | str]:
    """Return the GPUs that the driver lists; in place of one that cannot be used, why.

    What a control group keeps from this process is not among them: CUDA does not count it.
    """
    import pynvml

    found: list[Card | str] = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError_NoPermission):
            found.append(_card(number))
    return found


def _card(number: int) -> Card | str:
    import pynvml

    unusable = f"GPU {number} of the driver cannot be used"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        card = Card(describe_gpu(handle, number), instances_of(handle))
    except pynvml.NVMLError_NoPermission:
        raise
    except pynvml.NVMLError as cause:
        return f"{unusable} ({cause})"
    return f"{unusable} (it is in MIG mode and has no instance)" if card.instances == () else card


def instances_of(handle: Any) -> tuple[Gpu, ...] | None:
    """Return a GPU's MIG instances; None where it is not divided into such."""
    import pynvml

    try:
        if not pynvml.nvmlDeviceGetMigMode(handle)[0]:
            return None
    except pynvml.NVMLError:  # a GPU that cannot be divided
        return None
    found = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_NoPermission):  # there could be more than there are
            found.append(describe_gpu(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number), 0))
    return tuple(found)


def describe_gpu(handle: Any, index: int, uuid: str | None = None) -> Gpu:
    """Return what the driver says of a GPU or MIG instance; raises `pynvml.NVMLError`."""
    import pynvml

    return Gpu(
        index=index,
        uuid=uuid or str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=_total_bytes(handle),
        driver=str(pynvml.nvmlSystemGetDriverVersion()),
        pcie_generation=_link(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=_link(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )


def _total_bytes(handle: Any) -> int:
    import pynvml

    try:
        return int(memory_of(handle).total)
    except pynvml.NVMLError_NotSupported:  # a GPU that has no memory of its own
        return 0


def memory_of(handle: Any) -> Any:
    """Ask for memory without what the driver keeps for itself; older drivers only know the sum."""
    import pynvml

    try:
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetMemoryInfo(handle)


def _link(ask: Any, handle: Any) -> int | None:
    import pynvml

    try:
        return int(ask(handle))
    except pynvml.NVMLError:
        return None
