"""Which GPUs a sample may use and how full they are; asked of the driver (NVML), without importing torch."""

import ast
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ladezeit.errors import ConfigError, NotRunnableError, did_you_mean

#: Memory that may stay in use on a drained GPU above what was in use before: the driver gives its own back lazily.
DRAIN_SLACK_BYTES = 64 * 2**20
_DRAIN_POLL_S = 0.05


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
class ResolvedDevice:
    """The device a sample runs on (``cpu`` or ``cuda:N``).

    `gpu` is None on the CPU; `note` tells why the CPU was taken where a GPU may have been hoped for.
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


def cuda_devices() -> list[Gpu]:
    """Return the GPUs that CUDA shows to a process with this environment; none where there is no driver."""
    return _inventory()[0]


def torch_has_cuda() -> bool:
    """Say whether the installed torch was built for CUDA, by its version file; False where there is no torch."""
    return _torch_cuda_version() is not None


def resolve_device(asked: str) -> ResolvedDevice:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device of this machine.

    Raises:
        ConfigError: `asked` is none of these.
        NotRunnableError: the GPU that was asked for cannot be used here.
    """
    kind, _, index = asked.partition(":")
    if asked == "cpu":
        return ResolvedDevice("cpu", None, None)
    if asked != "auto" and (kind != "cuda" or not (asked == "cuda" or index.isdigit())):
        valid = ("auto", "cpu", "cuda", "cuda:0")
        raise ConfigError(f"device={asked} is not a device: use auto, cpu, cuda or cuda:N.{did_you_mean(asked, valid)}")
    gpus, why_none = _inventory()
    if gpus and not torch_has_cuda():
        why_none = "the installed torch has no CUDA: install a CUDA build of torch (https://pytorch.org/get-started)"
    wanted = int(index or 0)
    if why_none is None and wanted < len(gpus):
        return ResolvedDevice(f"cuda:{wanted}", gpus[wanted], None)
    if asked == "auto":
        return ResolvedDevice("cpu", None, f"running on the CPU: {why_none}")
    found = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus) or "no GPU"
    cause = f": {why_none}" if why_none else ""
    raise NotRunnableError(f"device={asked} was asked for, found {found}{cause}. Use device=cpu or device=auto")


def gpu_memory_used_bytes(gpu: Gpu) -> int:
    """Return the bytes in use on `gpu` by all processes; raises `NotRunnableError` where the driver does not answer."""
    return int(_memory_of(gpu).used)


def gpu_memory_free_bytes(gpu: Gpu) -> int:
    """Return the bytes that nobody uses on `gpu`; raises `NotRunnableError` where the driver does not answer."""
    return int(_memory_of(gpu).free)


def _memory_of(gpu: Gpu) -> Any:
    import pynvml

    try:
        with _nvml():
            return _memory(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
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


@contextmanager
def _nvml() -> Iterator[None]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _inventory() -> tuple[list[Gpu], str | None]:
    """Return the visible GPUs, and why there is none where there is none."""
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        with _nvml():
            gpus = select_visible(visible, _all())
    except pynvml.NVMLError as cause:
        return [], f"no NVIDIA driver answers ({cause})"
    if gpus:
        return gpus, None
    if visible is None:
        return [], "the NVIDIA driver knows no GPU"
    return [], f"CUDA_VISIBLE_DEVICES='{visible}' shows none"


def _all() -> list[Gpu]:
    import pynvml

    handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    return [_describe(handle, number) for number, handle in enumerate(handles)]


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
        return _describe(pynvml.nvmlDeviceGetHandleByUUID(entry), 0, uuid=entry)
    except pynvml.NVMLError:
        driver = gpus[0].driver if gpus else ""
        return Gpu(0, entry, "MIG instance", 0, driver, None, None)


def _describe(handle: Any, index: int, uuid: str | None = None) -> Gpu:
    import pynvml

    return Gpu(
        index=index,
        uuid=uuid or str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(_memory(handle).total),
        driver=str(pynvml.nvmlSystemGetDriverVersion()),
        pcie_generation=_link(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=_link(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
    )


def _memory(handle: Any) -> Any:
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
