"""Which GPUs a sample may use and how full they are; asked of the driver (NVML), without importing torch.

The driver and CUDA number GPUs each in a way of their own. A process that has opened CUDA has its numbers for good,
whatever its environment says since: there, torch is asked which GPU each of them is, by UUID. Elsewhere the numbers are
those that CUDA gives in the order of PCI addresses, the driver's, and `numbering_variables` has a new process give the
same.
"""

import ast
import importlib.util
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ladezeit.config.compose import check_device
from ladezeit.errors import NotRunnableError
from ladezeit.system.nvml import Card, Gpu, describe_gpu, instances_of, list_cards, memory_of, open_nvml

#: Memory that may stay in use on a drained GPU above what was in use before: the driver gives its own back lazily.
DRAIN_SLACK_BYTES = 64 * 2**20
_DRAIN_POLL_S = 0.05


@dataclass(frozen=True)
class ResolvedDevice:
    """The device a sample runs on (``cpu`` or ``cuda:N``).

    `gpu` is None on the CPU; `note` tells why the CPU was taken where a GPU may have been hoped for, or which GPU was
    left out.
    """

    name: str
    gpu: Gpu | None
    note: str | None


@dataclass(frozen=True)
class Drain:
    """How a wait for a GPU's memory ended: bytes in use at its end, seconds waited, whether they came down."""

    drained: bool
    used_bytes: int
    waited_s: float


@dataclass(frozen=True)
class _Inventory:
    """The GPUs that CUDA shows, by its numbers, and why there is none where there is none.

    From the number `doubtful` on, counting may lead to another GPU: one before it cannot be used, as `lost` says.
    `told` is whether a new process has to be told the GPUs one by one to number them so.
    """

    gpus: list[Gpu]
    why_none: str | None = None
    lost: str | None = None
    doubtful: int = sys.maxsize
    told: bool = False


def cuda_devices() -> list[Gpu]:
    """Return the GPUs that CUDA shows to this process, or would; none where there is no driver."""
    return _inventory().gpus


def numbering_variables() -> dict[str, str]:
    """Return the environment variables with which a new process numbers its GPUs as `cuda_devices` does."""
    found = _inventory()
    told = {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in found.gpus)} if found.told and found.gpus else {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **told}


def torch_has_cuda() -> bool:
    """Say whether the installed torch was built for CUDA, by its version file; False where there is no torch."""
    return _torch_cuda_version() is not None


def resolve_device(requested: str) -> ResolvedDevice:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device of this machine.

    Raises:
        ConfigError: `requested` is none of these.
        NotRunnableError: the GPU that was asked for cannot be used here.
    """
    check_device(requested)
    if requested == "cpu":
        return ResolvedDevice("cpu", None, None)
    index = requested.partition(":")[2]
    found = _inventory()
    gpus, why_none = found.gpus, found.why_none
    if gpus and not torch_has_cuda():
        why_none = "the installed torch has no CUDA: install a CUDA build of torch (https://pytorch.org/get-started)"
    wanted = int(index or 0)
    if index and why_none is None:
        _refuse_doubtful(found, [wanted], f"device={requested} was asked for")
    if why_none is None and wanted < len(gpus):
        note = None if found.lost is None else f"{found.lost}: it is left out, and cuda:0 is the first of the others"
        return ResolvedDevice(f"cuda:{wanted}", gpus[wanted], note if not index else None)
    if requested == "auto":
        return ResolvedDevice("cpu", None, f"running on the CPU: {why_none}")
    there = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus) or "no GPU"
    cause = f": {why_none}" if why_none else ""
    raise NotRunnableError(f"device={requested} was asked for, found {there}{cause}. Use device=cpu or device=auto")


def check_numbers(numbers: Iterable[int], requested: str) -> None:
    """Check that each N of ``cuda:N`` leads to the GPU that whoever wrote it means; `requested` opens the error.

    Raises:
        NotRunnableError: a GPU that is counted before it cannot be used, and CUDA may not count it.
    """
    _refuse_doubtful(_inventory(), numbers, requested)


def check_opened(device: str, gpu: Gpu) -> None:
    """Check that torch, which has opened `device` (``cuda:N``), means `gpu` by it: the one looked up and locked.

    Raises:
        NotRunnableError: it is another one.
    """
    import torch

    opened = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    # Of a MIG instance torch may tell the GPU that it is part of.
    if opened is not None and gpu.uuid.startswith("GPU-") and gpu.uuid != f"GPU-{opened}":
        raise NotRunnableError(
            f"{device} is GPU-{opened} in this process, and {gpu.uuid} ({gpu.name}) was looked up and locked: nothing "
            f"was loaded. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
        )


def gpu_memory_used_bytes(gpu: Gpu) -> int:
    """Return the bytes in use on `gpu` by all processes; raises `NotRunnableError` where the driver does not answer."""
    return int(_driver_memory(gpu).used)


def gpu_memory_free_bytes(gpu: Gpu) -> int:
    """Return the bytes that nobody uses on `gpu`; raises `NotRunnableError` where the driver does not answer."""
    return int(_driver_memory(gpu).free)


def _driver_memory(gpu: Gpu) -> Any:
    import pynvml

    try:
        with open_nvml():
            return memory_of(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
    except pynvml.NVMLError as cause:
        raise NotRunnableError(f"the driver does not tell how full {gpu.name} ({gpu.uuid}) is: {cause}") from cause


def wait_until_drained(gpu: Gpu, baseline_bytes: int, limit_s: float) -> Drain:
    """Wait at most `limit_s` seconds until `gpu` is no fuller than before a sample.

    Args:
        gpu: the GPU that an ended process used.
        baseline_bytes: what was in use before that process started; `DRAIN_SLACK_BYTES` more are let pass.
        limit_s: how long to wait.
    """
    started = time.monotonic()
    while True:
        used_bytes = gpu_memory_used_bytes(gpu)
        waited_s = time.monotonic() - started
        drained = used_bytes <= baseline_bytes + DRAIN_SLACK_BYTES
        if drained or waited_s >= limit_s:
            return Drain(drained, used_bytes, waited_s)
        time.sleep(_DRAIN_POLL_S)


def select_visible(visible: str | None, gpus: list[Gpu]) -> list[Gpu]:
    """Return what CUDA shows of `gpus`, in its order, for a value of ``CUDA_VISIBLE_DEVICES`` (None: not set).

    Entries are numbers, UUIDs or their beginnings, or MIG instances. The first entry that names no GPU ends the list;
    an entry named twice empties it, as CUDA does.
    """
    if visible is None:
        return gpus
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        gpu = _select(entry.strip(), gpus)
        if gpu is None:
            break
        if gpu.uuid in {other.uuid for other in chosen}:
            return []
        chosen.append(replace(gpu, index=len(chosen)))
    return chosen


def _refuse_doubtful(found: _Inventory, numbers: Iterable[int], requested: str) -> None:
    if any(number >= found.doubtful for number in numbers):
        others = ",".join(gpu.uuid for gpu in found.gpus)
        raise NotRunnableError(
            f"{requested}: {found.lost}, and what CUDA calls the GPUs after it is not certain. Name those to use: "
            f"CUDA_VISIBLE_DEVICES={others}"
        )


def _inventory() -> _Inventory:
    import pynvml

    opened = _opened_by_torch()
    if opened is not None:
        return _Inventory(opened, told=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        with open_nvml():
            found = _shown(visible, list_cards())
    except pynvml.NVMLError as cause:
        return _Inventory([], f"no NVIDIA driver answers ({cause})")
    if found.gpus:
        return found
    why = "the NVIDIA driver knows no GPU" if visible is None else f"CUDA_VISIBLE_DEVICES='{visible}' shows none"
    if found.lost is not None:
        why += f": {found.lost}, and what CUDA calls those after it is not certain. Name GPUs by UUID"
    return replace(found, why_none=why)


def _shown(visible: str | None, listed: list[Card | str]) -> _Inventory:
    """Return what CUDA shows of what the driver lists, in a process that has not opened it."""
    usable = [card for card in listed if isinstance(card, Card)]
    losses = [number for number, card in enumerate(listed) if isinstance(card, str)]
    lost = str(listed[losses[0]]) if losses else None
    doubtful = losses[0] if losses else sys.maxsize
    if visible is not None:
        # Numbers before the first loss are the same whether CUDA counts it or not, and UUIDs always are.
        entries = visible.split(",")
        counted = [entry.strip().isdigit() and int(entry) >= doubtful for entry in entries]
        doubtful = counted.index(True) if True in counted else sys.maxsize
        visible = ",".join(entries[:doubtful])
    chosen = select_visible(visible, [replace(card.gpu, index=number) for number, card in enumerate(usable)])
    # CUDA shows one MIG instance, and nothing beside it.
    instances = {card.gpu.uuid: card.instances for card in usable if card.instances}
    divided = [instances[gpu.uuid][0] for gpu in chosen if gpu.uuid in instances][:1]
    return _Inventory(divided or chosen, lost=lost, doubtful=doubtful, told=bool(losses))


def _opened_by_torch() -> list[Gpu] | None:
    """Return what each ``cuda:N`` is where this process has opened CUDA; None where not, or torch does not tell."""
    import pynvml

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    every = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    if not all(hasattr(properties, "uuid") for properties in every):
        return None
    try:
        with open_nvml():
            return [_of_torch(number, properties) for number, properties in enumerate(every)]
    except pynvml.NVMLError:
        return [_by_torch_alone(number, properties) for number, properties in enumerate(every)]


def _of_torch(number: int, properties: Any) -> Gpu:
    import pynvml

    with suppress(pynvml.NVMLError):
        return describe_gpu(pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{properties.uuid}"), number)
    with suppress(pynvml.NVMLError):
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        instances = instances_of(handle)
        if instances is None:
            return describe_gpu(handle, number)
        if len(instances) == 1:  # torch has told the GPU that its instance is part of
            return replace(instances[0], index=number)
    return _by_torch_alone(number, properties)


def _by_torch_alone(number: int, properties: Any) -> Gpu:
    return Gpu(number, f"GPU-{properties.uuid}", str(properties.name), int(properties.total_memory), "", None, None)


def _select(entry: str, gpus: list[Gpu]) -> Gpu | None:
    if entry.isdigit():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        return _mig(entry, gpus)
    matching = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def _mig(entry: str, gpus: list[Gpu]) -> Gpu | None:
    """Describe a MIG instance by its own name and memory where NVML finds it; CUDA may know more of them than NVML."""
    import pynvml

    try:
        return describe_gpu(pynvml.nvmlDeviceGetHandleByUUID(entry), 0, uuid=entry)
    except pynvml.NVMLError:
        driver = gpus[0].driver if gpus else ""
        return Gpu(0, entry, "MIG instance", 0, driver, None, None)


def _torch_cuda_version() -> str | None:
    # find_spec of a top-level package runs none of its code; importing torch would cost the supervisor seconds.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            target: ast.expr = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            continue
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node.value, ast.Constant):
            return str(node.value.value) if node.value.value else None
    return None
