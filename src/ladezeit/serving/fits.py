"""Whether a model fits where it is to go, known from the headers before a byte of a weight is read."""

from ladezeit.checkpoint.resolve import Checkpoint
from ladezeit.config import LoadingConfig, RunConfig, TransformersLoading
from ladezeit.loading import placement
from ladezeit.measure.limits import available_memory_bytes
from ladezeit.plan import TooLittleMemoryError, weights_bytes


def check_fits(config: RunConfig, checkpoint: Checkpoint, device: str) -> None:
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
    if placement.is_strategy(loading):
        _compare(config, needed, _free_on_all(loading, device), "memory on the GPUs together")
    elif placement.single_device(loading):
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
    budget = placement.max_memory(loading, device)
    indices = range(torch.cuda.device_count()) if budget is None else [key for key in budget if isinstance(key, int)]
    free = {index: free_gpu_bytes(f"cuda:{index}") for index in indices}
    return sum(free.values()) if budget is None else sum(min(free[index], budget[index]) for index in free)


def _compare(config: RunConfig, needed: int, available: int, where: str) -> None:
    if needed > available:
        raise TooLittleMemoryError(
            f"{config.model.name} by {config.loading.name} needs {needed / 2**30:.2f} GiB of {where}, "
            f"{available / 2**30:.2f} GiB are available: nothing was read. Unload what is not needed, take a smaller "
            f"dtype or model, or allow offload (loading='device_map_auto', allow_offload=True)"
        )
