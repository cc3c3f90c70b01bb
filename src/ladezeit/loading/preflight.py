"""Preflight checks: whether this machine can run a configuration with this model, before a byte of a weight is read.

`check_on_machine` looks at the GPUs that a placement names, `check_runnable` and `check_memory` at memory;
`devices_used` says which GPUs a sample holds. What the config alone shows is checked by
`ladezeit.config.rules`.
"""

from typing import Protocol

from ladezeit.checkpoint.dtypes import model_item_bytes
from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import CacheState, DType, LoadConfig, LoadingConfig, RunConfig, TransformersLoading
from ladezeit.config.device_map import gpu_index, is_strategy, list_places, single_device
from ladezeit.config.rules import check_placement
from ladezeit.errors import NotRunnableError
from ladezeit.loading import device_map, registry
from ladezeit.system.gpus import ResolvedDevice, check_numbers, cuda_devices
from ladezeit.system.limits import available_memory_bytes
from ladezeit.timing.profiler import check_installed

#: What a worker needs besides the weights: interpreter, libraries, activations.
_WORKER_BYTES = 1.5 * 2**30


def check_on_machine(loading: LoadingConfig, device: ResolvedDevice) -> None:
    """Check the placement once more, now that the device is known, and that the GPUs it names are there.

    Raises:
        CombinationError: see `check_placement`.
        NotRunnableError: the machine has no such GPU, or too few of them.
    """
    check_placement(loading, device.name)
    needed = _gpus_named(loading, device)
    if not needed:
        return
    if loading.process_count == 1:  # several ask for a count, whichever GPUs these are
        check_numbers(needed, f"the placement of {loading.name} names GPUs by number")
    gpus = cuda_devices()
    if max(needed) >= len(gpus):
        found = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus) or "no GPU"
        count = loading.process_count
        asked = f"loading.ranks={count}" if count > 1 else f"the placement of {loading.name}"
        raise NotRunnableError(
            f"{asked} needs {' and '.join(f'cuda:{index}' for index in sorted(needed))}, found {found}. "
            f"Use a machine that has them, or a placement on fewer devices"
        )


def devices_used(loading: LoadingConfig, device: ResolvedDevice) -> list[ResolvedDevice]:
    """Return all devices that a sample may be on, the run's own first: each is locked, and waited for, alone."""
    if device.gpu is None:
        return [device]
    budgeted = isinstance(loading, TransformersLoading) and bool(loading.max_memory)
    every = is_strategy(loading) and not budgeted
    named = _gpus_named(loading, device)
    if not every and named <= {device.gpu.index}:
        return [device]
    others = [gpu for gpu in cuda_devices() if gpu.uuid != device.gpu.uuid and (every or gpu.index in named)]
    return [device, *(ResolvedDevice(f"cuda:{gpu.index}", gpu, None) for gpu in others)]


def _gpus_named(loading: LoadingConfig, device: ResolvedDevice) -> set[int]:
    if loading.process_count > 1:
        return set(range(loading.process_count)) if device.gpu is not None else set()
    if not isinstance(loading, TransformersLoading):
        return set()
    indices = map(gpu_index, list_places(loading))
    return {index for index in indices if index is not None}


# The memory that a configuration needs, held against what the machine has before anything starts.


class Sizes(Protocol):
    """How large a checkpoint is, or will be."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        ...

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards."""
        ...

    @property
    def dtype(self) -> str:
        """torch's name of the weights' dtype."""
        ...

    @property
    def file_format(self) -> str:
        """``safetensors`` or ``pickle``."""
        ...


class TooLittleMemoryError(NotRunnableError):
    """Host or device memory is smaller than what the point needs."""


def weights_bytes(loading: LoadingConfig, checkpoint_bytes: int, checkpoint_dtype: str) -> int:
    """Return the bytes of the weights in memory: those on disk, scaled by the dtype that was asked for.

    For a quantized load they are the least it can need, as if it kept nothing: how much it keeps (the head, embeddings)
    is known only once the model is there. On the way one tensor at a time is there in full.
    """
    if loading.item_bytes is not None:
        return int(checkpoint_bytes * loading.item_bytes / model_item_bytes(checkpoint_dtype))
    if loading.dtype is DType.auto:
        return checkpoint_bytes
    return checkpoint_bytes * model_item_bytes(loading.dtype.value) // model_item_bytes(checkpoint_dtype)


def converts_dtype(loading: LoadingConfig, checkpoint_dtype: str) -> bool:
    """Return whether the weights in memory are other than those on disk, so that mapping the file is not enough."""
    changed = loading.dtype is not DType.auto and loading.dtype.value != checkpoint_dtype
    return changed or loading.item_bytes is not None


def host_bytes_needed(config: RunConfig, on_gpu: bool, checkpoint: Sizes) -> int:
    """Return the host memory that a sample needs at its peak, without what the kernel can take back."""
    loading = config.loading
    changed = converts_dtype(loading, checkpoint.dtype)
    own = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype) if changed else 0
    if on_gpu and not (isinstance(loading, TransformersLoading) and loading.move_to_device):
        own = 0
    cached = checkpoint.file_bytes if config.cache.state is CacheState.warm else 0
    return int(own + cached + _WORKER_BYTES * loading.process_count)


def check_runnable(config: RunConfig, device: ResolvedDevice, checkpoint: Sizes) -> None:
    """Check that this machine can run the point, before anything is read.

    Raises:
        ConfigError: there is no such engine.
        NotRunnableError: a profile was asked for and the profiler is not installed.
        CombinationError, NotRunnableError: the placement does not go with the device, or names GPUs that are not there.
        TooLittleMemoryError: naming what is needed and what there is.
    """
    loading = config.loading
    if config.profile:
        check_installed()
    registry.check_engine(loading.engine, device.name, checkpoint.file_format)
    loading.check_machine()
    check_on_machine(loading, device)
    needed = host_bytes_needed(config, device.gpu is not None, checkpoint)
    available = available_memory_bytes()
    if needed > available:
        raise TooLittleMemoryError(
            f"{config.model.name} by {loading.name} with cache={config.cache.state.value} needs "
            f"{needed / 2**30:.1f} GiB of host memory, {available / 2**30:.1f} GiB are available: take a smaller "
            f"model, cache=cold, or loading.dtype=auto, which keeps the checkpoint's own"
        )
    weights = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype) / loading.process_count
    if device.gpu is not None and single_device(loading) and weights > device.gpu.total_bytes > 0:
        raise TooLittleMemoryError(
            f"{config.model.name} by {loading.name} needs {weights / 2**30:.1f} GiB on {device.gpu.name}, which has "
            f"{device.gpu.total_bytes / 2**30:.1f} GiB: take a smaller dtype, or a placement over several devices"
        )


# Whether a model fits where it is to go, known from the headers before a byte of a weight is read.


def check_memory(config: LoadConfig, checkpoint: Checkpoint, device: str) -> None:
    """Check that the weights fit into the memory that is free now.

    Offload that was allowed makes room wherever it likes, and a mapping that the caller wrote is his own: neither is
    second-guessed.

    Raises:
        TooLittleMemoryError: naming what is needed and what there is.
    """
    loading = config.loading
    if not loading.disable_cpu_offload:
        return
    needed = weights_bytes(loading, checkpoint.weight_bytes, checkpoint.dtype)
    if device == "cpu" or (isinstance(loading, TransformersLoading) and loading.move_to_device):
        _compare(config, needed, available_memory_bytes(), "host memory")
    if device == "cpu":
        return
    if is_strategy(loading):
        _compare(config, needed, _free_on_all(loading, device), "memory on the GPUs together")
    elif single_device(loading):
        _compare(config, needed, free_gpu_bytes(device), f"memory on {device}")


def free_gpu_bytes(device: str) -> int:
    """Return what this process can still have on a GPU: what is free, and what torch holds there unused."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_on_all(loading: LoadingConfig, device: str) -> int:
    """Return what a strategy may fill: the GPUs of its budget, all of them where it has none."""
    import torch

    assert isinstance(loading, TransformersLoading)
    budget = device_map.max_memory(loading, device)
    indices = range(torch.cuda.device_count()) if budget is None else [key for key in budget if isinstance(key, int)]
    free = {index: free_gpu_bytes(f"cuda:{index}") for index in indices}
    return sum(free.values()) if budget is None else sum(min(free[index], budget[index]) for index in free)


def _compare(config: LoadConfig, needed: int, available: int, where: str) -> None:
    if needed > available:
        raise TooLittleMemoryError(
            f"{config.model.name} by {config.loading.name} needs {needed / 2**30:.2f} GiB of {where}, "
            f"{available / 2**30:.2f} GiB are available: nothing was read. Unload what is not needed, take a smaller "
            f"dtype or model, or allow offload (loading='device_map_auto', allow_offload=True)"
        )
